// What Moshi says, as it comes.

import { clock } from "./plots.js";

const PAUSE = 2000; // ms without a word: a new paragraph
const LONG = 500; // characters: likewise
const MOST = 1000; // paragraphs kept
const UNFINISHED = 500; // ms that a word waits for its next piece

export class Words {
  /** @param {HTMLElement} log a live region. @param {HTMLElement} cut shown once the oldest is gone. */
  constructor(log, cut) {
    this.log = log;
    this.cut = cut;
    this.clear();
  }

  clear() {
    clearTimeout(this.timer);
    this.log.replaceChildren();
    this.cut.hidden = true;
    this.word = "";
    this.paragraph = null;
    this.last = -Infinity;
  }

  /** Pieces are put together to words, or a screen reader would read out syllables. */
  add(piece, seconds) {
    clearTimeout(this.timer);
    if (piece.startsWith(" ")) this.flush();
    this.word += piece;
    this.seconds = seconds;
    this.timer = setTimeout(() => this.flush(), UNFINISHED);
  }

  flush() {
    if (!this.word) return;
    const { log } = this;
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 40; // not if one reads back
    const now = performance.now();
    const begins = this.word.startsWith(" ");
    if (!this.paragraph || now - this.last > PAUSE || (begins && this.length > LONG)) this.begin();
    this.paragraph.append(this.word);
    this.length += this.word.length;
    this.word = "";
    this.last = now;
    if (follows) log.scrollTop = log.scrollHeight;
  }

  begin() {
    this.paragraph = document.createElement("p");
    const time = document.createElement("time");
    time.textContent = clock(this.seconds);
    this.paragraph.append(time);
    this.length = 0;
    this.log.append(this.paragraph);
    if (this.log.childElementCount > MOST) {
      this.log.firstElementChild.remove();
      this.cut.hidden = false;
    }
  }

  /** All of it, a paragraph a line. */
  get text() {
    const lines = [...this.log.children].map((p) => {
      const [time, ...words] = [...p.childNodes].map((node) => node.textContent);
      return `${time} ${words.join("").trim()}`;
    });
    return lines.join("\n");
  }
}
