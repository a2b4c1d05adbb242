// Plots over time, drawn by hand: lines for a few layers, a strip of colour each for many.

const LEFT = 46, RIGHT = 38, TOP = 8, BOTTOM = 20; // px around the plot itself
const SPAN = 60; // s, the shortest stretch of time shown
const STEPS = [10, 15, 30, 60, 120, 300, 600, 900];

/** A number for people: three digits, no more zeros than needed. */
export function brief(value) {
  if (value == null) return "–";
  if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e5)) {
    return value.toExponential(1).replace("e+", "e");
  }
  return String(Number(value.toPrecision(3)));
}

/** 75 -> "1:15". */
export function clock(seconds) {
  const pad = (x) => String(x).padStart(2, "0");
  const s = Math.floor(seconds);
  const rest = `${pad(Math.floor(s / 60) % 60)}:${pad(s % 60)}`;
  return s < 3600 ? rest.replace(/^0/, "") : `${Math.floor(s / 3600)}:${rest}`;
}

/** The least of 1, 2, 5, 10, ... times a power of ten that is not below. */
function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 5, 10].find((step) => step * power >= value * (1 - 1e-9)) * power;
}

/** Clears a canvas and says where its plot goes; null where it is not to be seen. */
function begin(canvas, from, to) {
  const { clientWidth: width, clientHeight: height } = canvas;
  if (!width || !height) return null;
  const sharp = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * sharp);
  canvas.height = Math.round(height * sharp);
  const pen = canvas.getContext("2d");
  pen.scale(sharp, sharp);
  const style = getComputedStyle(canvas);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  pen.font = `12px ${style.fontFamily}`;
  pen.textBaseline = "middle";
  const right = width - RIGHT;
  const bottom = height - BOTTOM;
  const x = (t) => LEFT + ((t - from) / (to - from)) * (right - LEFT);
  pen.fillStyle = colour("soft");
  pen.textAlign = "center";
  const step = STEPS.find((s) => (to - from) / s <= (right - LEFT) / 55) ?? STEPS.at(-1);
  for (let t = Math.ceil(from / step) * step; t <= to; t += step) {
    pen.fillText(clock(t), x(t), height - BOTTOM / 2 + 2);
  }
  return { pen, colour, x, right, bottom };
}

/** From when to when a plot of these samples goes. */
export function stretch(samples) {
  const from = samples[0]?.t ?? 0;
  return [from, Math.max(from + SPAN, samples.at(-1)?.t ?? 0)];
}

/**
 * Lines over time, from 0 up.
 * @param {{ value: (sample) => number | null, colour: string, label?: string, dash?: number[] }[]}
 *   lines each in one of the colours of page.css, with its label at its end.
 * @param {number} [limit] a value to stay below, drawn as a line of its own.
 */
export function drawLines(canvas, samples, lines, limit) {
  const plot = begin(canvas, ...stretch(samples));
  if (!plot) return;
  const { pen, colour, x, right, bottom } = plot;
  let most = limit ?? 0;
  for (const { value } of lines) for (const s of samples) most = Math.max(most, value(s) ?? 0);
  const top = roundUp(most);
  const y = (v) => bottom - (v / top) * (bottom - TOP);
  pen.lineWidth = 1;
  for (const v of [0, top / 2, top]) {
    pen.strokeStyle = colour("line");
    pen.beginPath();
    pen.moveTo(LEFT, y(v));
    pen.lineTo(right, y(v));
    pen.stroke();
    pen.textAlign = "right";
    pen.fillText(brief(v), LEFT - 6, y(v));
  }
  if (limit !== undefined) {
    pen.strokeStyle = colour("alarm");
    pen.setLineDash([2, 3]);
    pen.beginPath();
    pen.moveTo(LEFT, y(limit));
    pen.lineTo(right, y(limit));
    pen.stroke();
  }
  const ends = limit === undefined ? [] : [{ colour: "alarm", label: brief(limit), x: right, y: y(limit) }];
  pen.lineWidth = 1.75;
  pen.lineJoin = "round";
  for (const line of lines) {
    pen.strokeStyle = colour(line.colour);
    pen.setLineDash(line.dash ?? []);
    pen.beginPath();
    let last = null;
    let end = null;
    for (const sample of samples) {
      const v = line.value(sample);
      if (v != null) {
        end = { colour: line.colour, label: line.label, x: x(sample.t), y: y(v) };
        pen[last == null ? "moveTo" : "lineTo"](end.x, end.y);
      }
      last = v;
    }
    pen.stroke();
    if (end?.label) ends.push(end);
  }
  pen.setLineDash([]);
  pen.textAlign = "left";
  let free = TOP;
  for (const end of ends.sort((a, b) => a.y - b.y)) {
    free = Math.max(free, end.y);
    pen.fillStyle = colour(end.colour);
    pen.fillText(end.label, Math.min(end.x, right) + 5, free);
    free += 12; // the next label not over this one
  }
}

/** The least and the largest of all values, infinite where there are none. */
export function rangeOf(samples, rows) {
  let range = [Infinity, -Infinity];
  for (const { value } of rows) {
    for (const sample of samples) {
      const v = value(sample);
      if (v != null) range = [Math.min(range[0], v), Math.max(range[1], v)];
    }
  }
  return range;
}

/**
 * A strip each, one above the other: the stronger the colour, the larger the value in its range.
 * @param {{ value: (sample) => number | null, label: string }[]} rows
 */
export function drawStrips(canvas, samples, rows) {
  const plot = begin(canvas, ...stretch(samples));
  if (!plot) return;
  const { pen, colour, x, right, bottom } = plot;
  const [low, high] = rangeOf(samples, rows);
  const height = (bottom - TOP) / rows.length;
  const every = Math.ceil(13 / height);
  rows.forEach(({ value, label }, row) => {
    const y = TOP + row * height;
    pen.fillStyle = colour("strong");
    samples.forEach((sample, i) => {
      const v = value(sample);
      if (v == null) return;
      const to = samples[i + 1]?.t ?? sample.t + 1;
      const left = x(sample.t);
      pen.globalAlpha = 0.1 + 0.9 * (high > low ? (v - low) / (high - low) : 0);
      pen.fillRect(left, y, Math.min(x(to), right) - left + 0.5, height - 1);
    });
    pen.globalAlpha = 1;
    pen.fillStyle = colour("soft");
    pen.textAlign = "right";
    if (row % every === 0) pen.fillText(label, LEFT - 6, y + height / 2);
  });
}
