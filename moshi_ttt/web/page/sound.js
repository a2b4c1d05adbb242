// Microphone and loudspeaker of one talk.

const RATE = 24000; // Moshi's own: nothing need be resampled
const FRAME_SECONDS = 0.08;

/** The microphones that the browser lets us see; without names, and so none, before it was asked. */
export async function microphones() {
  const devices = (await navigator.mediaDevices?.enumerateDevices()) ?? [];
  return devices.filter((device) => device.kind === "audioinput" && device.label);
}

/** Whether this page may ask for a microphone at all: not on http, but for the machine itself. */
export function canListen() {
  return window.isSecureContext && Boolean(navigator.mediaDevices?.getUserMedia);
}

/** What to do about an error of the browser's, as a sentence. */
export function explain(error) {
  const known = {
    NotAllowedError:
      "The browser does not allow this page to use the microphone. Allow it (the icon beside the " +
      "address, or the settings of the site), then start again.",
    NotFoundError: "No microphone was found. Plug one in, then start again.",
    NotReadableError:
      "The microphone cannot be used, perhaps because another program has it. Close that one, or " +
      "choose another microphone, then start again.",
    OverconstrainedError: "That microphone is gone. Choose another one, then start again.",
  };
  return known[error.name] ?? `The sound could not be started: ${error.message || error.name}.`;
}

const stop = (stream) => stream.getTracks().forEach((track) => track.stop());

export class Sound {
  /**
   * To be made while a tap or a key press is being handled, or a phone plays nothing.
   * @param {(frame: object) => void} onframe every 80 ms: what worklet.js posts; give back its buffer.
   * @param {(running: boolean) => void} onstate the browser has stopped or resumed all sound.
   * @param {() => void} ongone the microphone was unplugged, or taken away.
   */
  constructor({ onframe, onstate, ongone }) {
    this.handlers = { onframe, onstate, ongone };
    this.node = null;
    this.stream = null;
    this.source = null;
    this.muted = false;
    this.closed = false;
    this.begin({ sampleRate: RATE });
  }

  begin(options) {
    this.context = new AudioContext(options);
    this.context.onstatechange = () => {
      if (!this.closed) this.handlers.onstate(this.context.state === "running");
    };
    this.resume();
  }

  /** Hz, of what is sent and of what is to be played. */
  get rate() {
    return this.context.sampleRate;
  }

  /** Samples a frame. */
  get frame() {
    return Math.round(FRAME_SECONDS * this.rate);
  }

  /** Ask for a microphone and start. Raises what the browser raises, see `explain`. */
  async open(choice) {
    this.stream = await this.ask(choice);
    try {
      this.source = this.context.createMediaStreamSource(this.stream);
    } catch (error) {
      if (error.name !== "NotSupportedError") throw error;
      this.context.close(); // Firefox joins no microphone to a context of another rate
      this.begin();
      this.source = this.context.createMediaStreamSource(this.stream);
    }
    await this.context.audioWorklet.addModule(new URL("worklet.js", import.meta.url));
    if (this.closed) return;
    this.node = new AudioWorkletNode(this.context, "duplex", {
      channelCount: 1,
      channelCountMode: "explicit",
      outputChannelCount: [1],
      processorOptions: { frame: this.frame },
    });
    this.node.port.onmessage = ({ data }) => this.handlers.onframe(data);
    this.source.connect(this.node).connect(this.context.destination);
  }

  /** Take another microphone, or the same one in another way, while the talk goes on. */
  async change(choice) {
    const stream = await this.ask(choice);
    let source;
    try {
      source = this.context.createMediaStreamSource(stream);
    } catch (error) {
      stop(stream);
      throw error;
    }
    this.source.disconnect();
    stop(this.stream);
    this.source = source;
    this.stream = stream;
    source.connect(this.node);
  }

  async ask({ device, echo }) {
    const stream = await navigator.mediaDevices.getUserMedia({
      audio: {
        deviceId: device ? { exact: device } : undefined,
        echoCancellation: echo,
        noiseSuppression: true,
        autoGainControl: true,
        channelCount: 1,
      },
    });
    const [track] = stream.getAudioTracks();
    if (this.closed) {
      stop(stream);
      throw new DOMException("stopped meanwhile", "AbortError");
    }
    track.onended = () => this.stream === stream && this.handlers.ongone();
    track.enabled = !this.muted;
    return stream;
  }

  /** Play a message of the server's, kind 1; its buffer is gone afterwards. */
  play(buffer) {
    this.node?.port.postMessage({ play: buffer }, [buffer]);
  }

  /** The buffer of a frame, to be filled again. */
  giveBack(buffer) {
    this.node?.port.postMessage({ back: buffer }, [buffer]);
  }

  /** A muted microphone gives silence: the talk goes on. */
  mute(muted) {
    this.muted = muted;
    this.stream?.getAudioTracks().forEach((track) => (track.enabled = !muted));
  }

  /** After a phone call or the like; does nothing where all is well. */
  resume() {
    if (this.closed) return;
    this.context.resume().catch((error) => console.info(error.message)); // closed meanwhile
  }

  close() {
    if (this.closed) return;
    this.closed = true;
    if (this.node) this.node.port.onmessage = null;
    if (this.stream) stop(this.stream);
    this.context.close();
  }
}

/** Keeps a phone's screen on, where it can: with the screen off, most of them stop the sound. */
export class Awake {
  constructor() {
    this.wanted = false;
    this.lock = null;
    document.addEventListener("visibilitychange", () => this.update()); // hiding takes it away
  }

  set(wanted) {
    this.wanted = wanted;
    return this.update();
  }

  async update() {
    if (this.wanted && !document.hidden) {
      // Refused when the battery is low: then the screen goes off as it always does.
      this.lock = await navigator.wakeLock?.request("screen").catch(() => null);
    }
    if (!this.wanted) this.lock?.release();
  }
}
