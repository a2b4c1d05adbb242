// The audio thread: cuts the microphone into frames of 80 ms and plays what comes back.
//
// Nothing is allocated here while it runs but the message that carries a frame: the buffers of the
// frames go to the page and come back, what is to be played is written into a ring.

const SPARE = 8; // buffers of frames; with all of them away the page is stalled, and frames are lost
const START = 2; // frames to be there before playing begins: what the network may be late by
const ENOUGH = 3; // with more than this a pause in the speech is cut short, until it is no more
const MOST = 6; // with more than this the oldest are dropped: the delay cannot grow
const QUIET = 0.004; // sound below this can be left out unheard

class Duplex extends AudioWorkletProcessor {
  constructor({ processorOptions: { frame } }) {
    super();
    this.frame = frame; // samples
    this.free = Array.from({ length: SPARE }, () => this.empty());
    this.view = this.free.pop();
    this.at = 0;
    this.ring = new Float32Array(2 * MOST * frame);
    this.read = 0;
    this.filled = 0;
    this.playing = false;
    this.heard = 0; // sums of squares of the frame that is being filled
    this.said = 0;
    this.lost = 0; // frames of the microphone
    this.skipped = 0; // samples not played
    this.gaps = 0; // times that nothing was there to play
    this.port.onmessage = ({ data }) => (data.back ? this.back(data.back) : this.add(data.play));
  }

  // A message of the protocol: kind 1, then int16 little endian.
  empty() {
    const view = new DataView(new ArrayBuffer(1 + 2 * this.frame));
    view.setUint8(0, 1);
    return view;
  }

  back(buffer) {
    this.free.push(new DataView(buffer));
  }

  add(buffer) {
    const view = new DataView(buffer, 1);
    const size = this.ring.length;
    const count = Math.min(view.byteLength >> 1, size);
    this.skip(Math.max(0, this.filled + count - size));
    for (let i = 0, to = this.read + this.filled; i < count; i++, to++) {
      this.ring[to % size] = view.getInt16(2 * i, true) / 32768;
    }
    this.filled += count;
    if (this.filled > MOST * this.frame) this.skip(this.filled - START * this.frame);
    if (this.filled >= START * this.frame) this.playing = true;
  }

  skip(count) {
    this.read = (this.read + count) % this.ring.length;
    this.filled -= count;
    this.skipped += count;
  }

  isQuiet(count) {
    for (let i = 0; i < count; i++) {
      if (Math.abs(this.ring[(this.read + i) % this.ring.length]) > QUIET) return false;
    }
    return true;
  }

  process(inputs, outputs) {
    const out = outputs[0][0];
    this.capture(inputs[0][0], out.length);
    if (this.filled > ENOUGH * this.frame && this.isQuiet(out.length)) this.skip(out.length);
    if (this.playing && this.filled < out.length) {
      this.playing = false;
      this.gaps++;
    }
    if (!this.playing) return true; // `out` is silence
    for (let i = 0; i < out.length; i++) {
      const sample = this.ring[this.read];
      this.read = (this.read + 1) % this.ring.length;
      this.said += sample * sample;
      out[i] = sample;
    }
    this.filled -= out.length;
    return true;
  }

  // `input` is undefined while microphones are changed: silence, so that the talk goes on.
  capture(input, count) {
    for (let i = 0; i < count; i++) {
      const sample = input ? Math.max(-1, Math.min(1, input[i])) : 0;
      this.heard += sample * sample;
      this.view.setInt16(1 + 2 * this.at, 32767 * sample, true);
      if (++this.at === this.frame) this.send();
    }
  }

  send() {
    this.at = 0;
    if (this.free.length) {
      const { buffer } = this.view;
      this.view = this.free.pop();
      const { lost, skipped, gaps, frame } = this;
      const heard = Math.sqrt(this.heard / frame);
      const said = Math.sqrt(this.said / frame);
      const buffered = this.filled;
      this.port.postMessage({ buffer, heard, said, buffered, lost, skipped, gaps }, [buffer]);
    } else {
      this.lost++;
    }
    this.heard = 0;
    this.said = 0;
  }
}

registerProcessor("duplex", Duplex);
