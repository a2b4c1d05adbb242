// The memory that stays: a name, what is kept under it, and what to do with that.

import { deleteMemory, exportMemory, findMemory } from "./server.js";
import { local } from "./storage.js";

const TYPING = 400; // ms

/** 754 -> "13 min". */
export function duration(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** Unix seconds -> "today 14:03". */
export function moment(at) {
  const date = new Date(1000 * at);
  const time = date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(date).setHours(0, 0, 0, 0)) / 864e5);
  if (days === 0) return `today ${time}`;
  if (days === 1) return `yesterday ${time}`;
  return `on ${date.toLocaleDateString("en-GB", { dateStyle: "medium" })} ${time}`;
}

export class Kept {
  /**
   * @param {Record<string, HTMLElement>} dom elements by id.
   * @param {(sentence: string) => void} alarm says that something went wrong.
   * @param {(name: string) => void} onkeep asks the talk for a save; the name only if it has none.
   */
  constructor(dom, alarm, onkeep) {
    Object.assign(this, { dom, alarm });
    this.talk = null; // { user, incognito } while there is one
    this.memory = null; // what is kept under the name
    this.looking = 0;
    this.saving = false; // the last talk, by the server
    this.troubled = false; // the last save has failed
    this.note = "";
    dom.name.value = local.get("name");
    dom.name.addEventListener("input", () => this.typed());
    dom.incognito.addEventListener("change", () => this.render());
    dom.keepNow.addEventListener("click", () => {
      if (!this.talk.user && !this.name) {
        dom.name.focus();
        this.say("Give a name first: it is kept under that.");
      } else {
        this.say("Saving …");
        this.talk.asked = this.name; // which may be typed over until it is saved
        onkeep(this.talk.user ? "" : this.name);
      }
    });
    dom.download.addEventListener("click", () => this.download());
    dom.remove.addEventListener("click", () => this.askToRemove());
    dom.removeSure.addEventListener("click", () => this.remove());
  }

  get name() {
    return this.dom.name.value.trim();
  }

  /** What a talk is begun with, as options of the query. */
  get choice() {
    const start = this.memory && this.dom.startNew.checked ? "new" : "";
    const incognito = this.dom.incognito.checked ? "1" : "";
    return this.possible ? { user: this.name, start, incognito } : {};
  }

  get possible() {
    return Boolean(this.model?.memory && this.model.keeps);
  }

  /** The server's model is known. */
  configure(model) {
    this.model = model;
    this.dom.keepNone.textContent = !model.memory
      ? "This model has no memory: it will not remember you."
      : "This server keeps no memories: what is learned is gone at the end of a talk.";
    this.dom.keepNone.hidden = this.possible;
    this.dom.keepSome.hidden = !this.possible;
    return this.look();
  }

  typed() {
    this.memory = null;
    this.note = "";
    local.set("name", this.name);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), TYPING);
    this.render();
  }

  /** Ask the server what is kept under the name. */
  async look() {
    const mine = ++this.looking;
    let found = null;
    let problem = "";
    if (this.possible && this.name) {
      try {
        found = await findMemory(this.name);
      } catch (error) {
        problem = error.message;
      }
    }
    if (mine !== this.looking) return;
    this.memory = found;
    if (problem) this.note = problem;
    this.render();
  }

  /** A talk has begun, as the server says in its "hello". */
  begin({ user, incognito, start, seconds }) {
    this.talk = { user, incognito };
    this.note = start === "kept" ? `It starts with what it learned from ${duration(seconds)} of talk.` : "";
    this.render();
  }

  saved({ seconds, at }) {
    if (this.talk && !this.talk.user) {
      this.talk.user = this.dom.name.value = this.talk.asked;
      local.set("name", this.name);
    }
    if (this.troubled) this.alarm("");
    this.troubled = false;
    this.say(`Saved ${moment(at)}, with ${duration(seconds)} of talk.`);
    this.look(); // it can be downloaded now
  }

  failed({ reason }) {
    this.say("");
    this.troubled = true;
    this.alarm(`The memory could not be saved: ${reason}`);
  }

  /**
   * The talk is over; the server saves it now, and the next one starts with that.
   * @param {boolean} heard there is something to save.
   */
  async end(heard) {
    if (!this.talk) return;
    this.saving = heard && Boolean(this.talk.user) && !this.talk.incognito;
    this.talk = null;
    this.note = "";
    this.dom.startKept.checked = true;
    const before = this.memory?.saved;
    for (const wait of this.saving ? [300, 700, 1500, 3000] : []) {
      this.render();
      await new Promise((then) => setTimeout(then, wait));
      if (this.talk) break;
      await this.look();
      if (this.memory?.saved !== before) break;
    }
    this.saving = false;
    this.render();
  }

  async download() {
    try {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await exportMemory(this.name));
      link.download = `${this.name}.safetensors`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
      this.say("Downloaded.");
    } catch (error) {
      this.alarm(`The memory could not be downloaded: ${error.message}`);
    }
  }

  askToRemove() {
    const { saved, seconds } = this.memory;
    this.dom.removeWhat.textContent =
      `What is kept of ${this.name} (${duration(seconds)} of talk, saved ${moment(saved)}) ` +
      "will be gone. This cannot be undone.";
    this.dom.removeDialog.showModal();
  }

  async remove() {
    try {
      await deleteMemory(this.name);
      this.note = "Deleted.";
    } catch (error) {
      this.alarm(`The memory could not be deleted: ${error.message}`);
    }
    await this.look();
    this.dom.name.focus(); // the button that was used is disabled now
  }

  say(note) {
    this.note = note;
    this.render();
  }

  render() {
    const { dom, memory, talk } = this;
    const incognito = talk ? talk.incognito : dom.incognito.checked;
    dom.name.disabled = Boolean(talk?.user);
    dom.incognito.disabled = Boolean(talk);
    dom.start.hidden = !memory || Boolean(talk);
    if (memory) {
      dom.startKeptText.textContent =
        `Start with what it learned from you: ${duration(memory.seconds)} of talk, ` +
        `saved ${moment(memory.saved)}`;
    }
    dom.keepNow.disabled = !talk || talk.incognito;
    dom.download.disabled = !memory;
    dom.remove.disabled = !memory || Boolean(talk) || this.saving;
    dom.keptState.textContent = [this.note, this.sentence(incognito)].filter(Boolean).join(" ");
  }

  sentence(incognito) {
    const { memory, talk, note } = this;
    if (incognito) return "Incognito: nothing of this talk is written down.";
    if (talk) {
      if (talk.user) return note.startsWith("Sav") ? "" : "It is saved every minute and at the end.";
      return "Nothing is kept, unless you give a name and press “Keep memory now”.";
    }
    if (this.saving) return "It is being saved …";
    if (!this.name) return "Without a name nothing is kept.";
    return memory ? "" : "Nothing is kept under this name yet.";
  }
}
