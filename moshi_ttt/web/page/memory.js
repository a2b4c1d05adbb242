// The memory made visible: what each layer does, over time, as plots and as a table.

import { brief, drawLines, drawStrips, rangeOf } from "./plots.js";

const KEPT = 30 * 60; // s
const MOST = 720; // samples; beyond that the older half is thinned
const FEW = 4; // layers; with more, lines could not be told apart

/** Samples over time, `{ t, ... }`: half an hour of them at the most, the older ones thinner. */
export class History {
  constructor() {
    this.samples = [];
  }

  add(sample) {
    const { samples } = this;
    samples.push(sample);
    const old = samples.findIndex(({ t }) => t >= sample.t - KEPT);
    samples.splice(0, old);
    if (samples.length > MOST) {
      const half = samples.splice(0, samples.length >> 1);
      samples.unshift(...half.filter((_, i) => i % 2 === 0));
    }
  }
}

const PLOTS = [
  { key: "update", title: "How much a write changes", what: "|ΔW| / |W| of the fast weights" },
  { key: "moved", title: "How far from its start", what: "|W − W0| / |W0|" },
  { key: "loss_before", title: "Inner loss before a write", what: "how badly it recalls what it heard" },
  { key: "loss_after", title: "Inner loss after it", what: "lower: it has learned" },
];
const BOTH = { key: "loss", title: "Inner loss", what: "dashed before a write, solid after" };
const COLUMNS = ["update", "loss_before", "loss_after", "moved", "state", "gate_abs"];

/** "transformer.layers.12" -> "12". */
const short = (name) => name.slice(name.lastIndexOf(".") + 1);

export class MemoryView {
  /** @param {HTMLElement} root with .plots, a table and .none in it. */
  constructor(root) {
    this.root = root;
    this.history = new History();
    this.figures = [];
    this.layers = [];
    new ResizeObserver(() => this.draw()).observe(root);
  }

  /** A model's layers that have a memory; their figures and rows are made here. */
  show(layers) {
    this.history = new History();
    this.layers = layers;
    const any = layers.length > 0;
    this.root.querySelector(".some").hidden = !any;
    this.root.querySelector(".none").hidden = any;
    this.few = layers.length <= FEW;
    const plots = this.few ? [PLOTS[0], BOTH, PLOTS[1]] : PLOTS;
    this.figures = any ? plots.map((plot) => this.figure(plot)) : [];
    const place = this.root.querySelector(".plots");
    place.classList.toggle("few", this.few);
    place.replaceChildren(...this.figures.map((f) => f.element));
    this.rows = layers.map((name) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = short(name);
      row.append(head, ...COLUMNS.map(() => document.createElement("td")));
      return row;
    });
    this.root.querySelector("tbody").replaceChildren(...this.rows);
    this.root.querySelector(".how").textContent = this.few
      ? "One line for each layer, with its number at the end."
      : "One strip for each layer, from its least value, pale, to its largest.";
    this.table(null);
    this.draw();
  }

  figure(plot) {
    const element = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const title = document.createElement("b");
    title.textContent = plot.title;
    const what = document.createElement("span");
    what.textContent = plot.what;
    const range = document.createElement("span");
    range.className = "range";
    caption.append(range, title, " ", what);
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${plot.title}, over time. The values are in the table.`);
    if (!this.few) {
      const height = Math.max(5, Math.min(16, 220 / this.layers.length)) * this.layers.length;
      canvas.style.height = `${Math.round(height) + 28}px`;
    }
    element.append(caption, canvas);
    return { ...plot, element, canvas, range };
  }

  /** @param {object} values by layer, as the server's "stats" have them; absent before the first. */
  add(t, values) {
    if (!values) return;
    this.history.add({ t, values });
    this.table(values);
    this.draw();
  }

  table(values) {
    this.rows.forEach((row, i) => {
      const of = values?.[this.layers[i]];
      COLUMNS.forEach((key, column) => (row.cells[column + 1].textContent = brief(of?.[key])));
    });
  }

  draw() {
    if (document.hidden) return;
    const { samples } = this.history;
    const value = (name, key) => (sample) => sample.values[name]?.[key];
    for (const { key, canvas, range } of this.figures) {
      if (!this.few) {
        const rows = this.layers.map((n) => ({ value: value(n, key), label: short(n) }));
        const [low, high] = rangeOf(samples, rows);
        range.textContent = low <= high ? `${brief(low)} to ${brief(high)}` : "";
        drawStrips(canvas, samples, rows);
        continue;
      }
      const lines = this.layers.flatMap((name, i) => {
        const line = { colour: `layer${i}`, label: short(name) };
        if (key !== "loss") return [{ ...line, value: value(name, key) }];
        const before = { ...line, label: "", dash: [3, 3], value: value(name, "loss_before") };
        return [before, { ...line, value: value(name, "loss_after") }];
      });
      drawLines(canvas, samples, lines);
    }
  }
}
