// The page: puts sound, server, words, memory and what is kept together.

import { Kept } from "./kept.js";
import { MemoryView, History } from "./memory.js";
import { brief, drawLines } from "./plots.js";
import { findToken, model as askModel, Refused, setToken, Talk } from "./server.js";
import { Awake, canListen, explain, microphones, Sound } from "./sound.js";
import { local } from "./storage.js";
import { Words } from "./words.js";

const FRAME_MS = 80;
const FULL = 1013; // close code
const dom = Object.fromEntries([...document.querySelectorAll("[id]")].map((e) => [e.id, e]));
const words = new Words(dom.log, dom.cut);
const memory = new MemoryView(dom.memory);
const kept = new Kept(dom, alarm, (user) => current.talk.keep(user));
const awake = new Awake();

let current = null; // the talk that is, or is about to be: { sound, talk, frames, ... }
let lost = false; // the last one ended without being asked to
let times = new History();

// -- what is said to the user ---------------------------------------------------------------------

/** @param {string} said may be the server's, which begins small and has no full stop. */
function alarm(said) {
  const sentence = said && said[0].toUpperCase() + said.slice(1);
  dom.alarm.textContent = sentence && sentence.replace(/[^.!?)]$/, "$&.");
  dom.alarm.hidden = !said;
}

function status(sentence) {
  if (dom.status.textContent !== sentence) dom.status.textContent = sentence;
}

function show(label) {
  const talking = Boolean(current);
  dom.toggle.textContent = label;
  dom.toggle.classList.toggle("stop", talking);
  dom.mute.disabled = !talking;
  document.title = talking ? "● Talk to Moshi" : "Talk to Moshi";
}

// -- start and stop -------------------------------------------------------------------------------

const audioChoice = () => ({ device: dom.device.value, echo: dom.echo.checked });

async function start() {
  alarm("");
  status("Asking for the microphone …");
  const mine = { sound: null, talk: null, frames: 0, answered: 0, again: lost };
  current = mine;
  show("Stop");
  try {
    mine.sound = new Sound({
      onframe: (frame) => hear(mine, frame),
      onstate: (running) => soundState(mine, running),
      ongone: () => over(mine, "The microphone is gone. Choose another one, then start again."),
    });
    setMuted(false);
    await mine.sound.open(audioChoice());
  } catch (error) {
    if (current === mine) over(mine, explain(error));
    return;
  }
  if (current !== mine) return;
  listDevices();
  status("Connecting …");
  mine.talk = new Talk(
    { rate: mine.sound.rate, ...kept.choice },
    {
      onready: () => begun(mine),
      onaudio: (buffer) => {
        mine.answered++;
        mine.sound.play(buffer);
      },
      ontext: (text) => words.add(text, (mine.frames * FRAME_MS) / 1000),
      onmetadata: (message) => told(mine, message),
      onover: (end) => ended(mine, end),
    },
  );
}

function begun(mine) {
  if (!mine.again) words.clear();
  times = new History();
  awake.set(true);
  soundState(mine, mine.sound.context.state === "running");
}

/** Whatever there is of a talk is put away. */
function over(mine, problem = "", again = false) {
  if (current !== mine) return;
  current = null;
  lost = again;
  mine.talk?.close();
  mine.sound?.close();
  awake.set(false);
  words.flush();
  kept.end(mine.answered > 0);
  loudest.heard = loudest.said = 0;
  level("heard", 0);
  level("said", 0);
  alarm(problem);
  status(problem ? "Not connected." : "The talk is over.");
  show(lost ? "Reconnect" : "Start talking");
}

/** The server has ended the talk, or the network has. */
async function ended(mine, { reason, code, begun }) {
  if (reason) return over(mine, reason, begun && code !== FULL);
  if (begun) return over(mine, "The connection to the server is lost. Reconnect to go on.", true);
  over(mine, "The server cannot be reached.");
  return loadModel(); // which says what is wrong, if it is the token
}

function soundState(mine, running) {
  if (current !== mine || !mine.talk?.begun) return;
  dom.resume.hidden = running;
  status(running ? "Moshi is listening. Speak." : "The browser has paused the sound.");
}

// -- while it goes on -----------------------------------------------------------------------------

function hear(mine, frame) {
  if (current === mine && mine.talk?.begun) {
    mine.talk.hear(frame.buffer);
    mine.frames++;
    level("heard", frame.heard);
    level("said", frame.said);
    mine.frame = frame;
  }
  mine.sound.giveBack(frame.buffer);
}

const loudest = { heard: 0, said: 0, count: 0 };
const bar = { heard: 0, said: 0 };
const calm = window.matchMedia("(prefers-reduced-motion: reduce)");

/** The bar rises at once and falls slowly; the words come twice a second, or nobody could read them. */
function level(side, rms) {
  bar[side] = Math.max(rms, current ? 0.7 * bar[side] : 0);
  const db = (x) => Math.max(-60, Math.min(0, 20 * Math.log10(x || 1e-9)));
  const meter = dom[`${side}Level`];
  const draw = () => (meter.firstElementChild.style.transform = `scaleX(${1 + db(bar[side]) / 60})`);
  if (!calm.matches) draw();
  loudest[side] = Math.max(loudest[side], rms);
  if (current && loudest.count++ % 12 > 1) return;
  draw();
  const loud = db(loudest[side]);
  loudest[side] = 0;
  const muted = side === "heard" && current && dom.mute.getAttribute("aria-pressed") === "true";
  const text = muted ? "muted" : loud <= -60 ? "silent" : `${loud.toFixed(0).replace("-", "−")} dB`;
  meter.setAttribute("aria-valuenow", loud.toFixed(0));
  meter.setAttribute("aria-valuetext", text);
  dom[`${side}Text`].textContent = text;
}

function told(mine, message) {
  if (message.type === "hello") {
    memory.show(message.layers);
    kept.begin(message);
  }
  if (message.type === "saved") kept.saved(message);
  if (message.type === "save failed") kept.failed(message);
  if (message.type !== "stats") return;
  const t = (message.frames * FRAME_MS) / 1000;
  memory.add(t, message.layers);
  times.add({ t, ms: message.ms });
  numbers(mine, message);
  drawTimes();
}

function numbers(mine, { ms, dropped, late, sessions, rows }) {
  const { frame } = mine;
  const milliseconds = (samples) => Math.round((1000 * samples) / mine.sound.rate);
  dom.ms.textContent = `${brief(ms.p50)} / ${brief(ms.p95)}`;
  dom.late.textContent = late;
  dom.exchanged.textContent = `${mine.frames} / ${mine.answered}`;
  dom.droppedServer.textContent = `${dropped.heard} / ${dropped.said}`;
  dom.droppedHere.textContent = `${(frame?.lost ?? 0) + mine.talk.unsent} / ${frame?.gaps ?? 0}`;
  dom.skipped.textContent = `${milliseconds(frame?.skipped ?? 0)} ms`;
  dom.delay.textContent = `${milliseconds(frame?.buffered ?? 0)} ms`;
  dom.sessions.textContent = `${sessions} of ${rows}`;
}

function drawTimes() {
  if (document.hidden) return;
  const lines = [
    { colour: "layer0", label: "mean", value: ({ ms }) => ms.mean },
    { colour: "layer1", label: "p95", dash: [3, 3], value: ({ ms }) => ms.p95 },
  ];
  drawLines(dom.times, times.samples, lines, FRAME_MS);
}

// -- controls -------------------------------------------------------------------------------------

function setMuted(muted) {
  current?.sound?.mute(muted);
  dom.mute.setAttribute("aria-pressed", muted);
}

async function listDevices() {
  const wanted = dom.device.value || local.get("device");
  const found = await microphones();
  const options = found.map(({ label, deviceId }) => new Option(label, deviceId));
  if (!found.some(({ deviceId }) => deviceId === "default")) {
    options.unshift(new Option("Default microphone", ""));
  }
  dom.device.replaceChildren(...options);
  if (found.some(({ deviceId }) => deviceId === wanted)) dom.device.value = wanted;
}

async function changeAudio() {
  local.set("device", dom.device.value);
  local.set("no echo cancellation", dom.echo.checked ? "" : "1");
  if (!current?.sound.node) return;
  try {
    await current.sound.change(audioChoice());
    alarm("");
  } catch (error) {
    alarm(explain(error));
  }
}

async function loadModel() {
  let model;
  try {
    model = await askModel();
  } catch (error) {
    if (error.status === 401 || error.status === 429) askToken(error.message);
    else if (error instanceof Refused) alarm(error.message);
    else alarm(`The server cannot be reached (${error.message}). Reload the page to try again.`);
    return;
  }
  dom.model.textContent = model.name;
  dom.sessions.textContent = `${model.taken} of ${model.rows}`;
  memory.show(model.layers);
  await kept.configure(model);
  if (model.token && !findToken()) askToken("This server wants a token; who runs it knows it.");
}

function askToken(sentence) {
  dom.tokenForm.hidden = false;
  alarm(sentence);
  dom.token.focus();
}

dom.toggle.addEventListener("click", () => (current ? over(current) : start()));
dom.mute.addEventListener("click", () => {
  setMuted(dom.mute.getAttribute("aria-pressed") !== "true");
});
dom.resume.addEventListener("click", () => current?.sound?.resume());
dom.device.addEventListener("change", changeAudio);
dom.echo.addEventListener("change", changeAudio);
dom.tokenForm.addEventListener("submit", (event) => {
  event.preventDefault();
  setToken(dom.token.value);
  dom.tokenForm.hidden = true;
  alarm("");
  loadModel();
});
dom.copy.addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(words.text);
    status("The text is copied.");
  } catch (error) {
    alarm(`The text could not be copied: ${error.message}`); // not on http, nor if it was forbidden
  }
});
navigator.mediaDevices?.addEventListener("devicechange", listDevices);
document.addEventListener("visibilitychange", () => {
  memory.draw();
  drawTimes();
  if (!document.hidden) current?.sound?.resume();
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  memory.draw();
  drawTimes();
});
new ResizeObserver(drawTimes).observe(dom.times);

dom.echo.checked = !local.get("no echo cancellation");
findToken();
show("Start talking");
if (canListen()) {
  status("Not connected.");
  listDevices();
} else {
  dom.toggle.disabled = true;
  status("No microphone can be used here.");
  dom.insecure.hidden = false;
}
loadModel();
