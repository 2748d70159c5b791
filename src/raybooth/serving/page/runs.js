// Runs: their stages, the loss, the pictures so far; stopping and going on.

import { call, json, show } from "./server.js";
import { $, el, say, svg, tell } from "./dom.js";

const TITLES = {
  prepare: "Photographs",
  "class-images": "Pictures of the class",
  encode: "Encoding",
  finetune: "Learning",
  generate: "First pictures",
};
const OFTEN = 1000; // milliseconds between looks while something runs
const SELDOM = 10_000; // and else: others may start and remove runs and subjects
const STATES = { queued: "waits its turn", running: "running", done: "ready", failed: "failed", stopped: "stopped" };

const cards = new Map(); // id -> what is on the page of a run
let timer = null;
let trouble = null;

// `finished(run)` hears of every run that becomes ready while the page is open; `looked()` of every other look, which may be one at the subjects too.
export function setUp(finished, looked) {
  let offered = true;
  const look = async () => {
    try {
      const { runs } = offered ? await json("/api/runs") : { runs: [] };
      showAll(runs, finished, refresh);
      told(null);
      if (runs.some((r) => r.state === "running" || r.state === "queued")) return OFTEN;
    } catch (error) {
      if (error.status === 401) return null; // without the key there is nothing to be seen: the next action asks for it again
      offered = error.status !== 404; // a server that starts no runs
      if (offered) told(error.message);
    }
    await looked().catch(() => null);
    if (!offered) $("new-subject").hidden = $("welcome").hidden = true;
    return SELDOM;
  };
  const refresh = async () => {
    clearTimeout(timer);
    timer = null;
    const pause = document.hidden ? null : await look();
    clearTimeout(timer); // of another look, meanwhile
    if (pause) timer = setTimeout(refresh, pause);
  };
  document.addEventListener("visibilitychange", () => document.hidden || refresh());
  return refresh;
}

function told(why) {
  if (why && !trouble) $("runs").prepend((trouble = el("p", { className: "soft" })));
  if (why) trouble.textContent = why;
  else trouble?.remove();
  if (!why) trouble = null;
}

function showAll(runs, finished, refresh) {
  const shown = new Set(runs.map((r) => r.id));
  const first = cards.size === 0;
  for (const [id, card] of cards) {
    if (shown.has(id)) continue;
    card.element.remove();
    cards.delete(id);
  }
  for (const run of runs) {
    const known = cards.get(run.id);
    const card = known ?? made(run, refresh);
    cards.set(run.id, card);
    if (!known) {
      card.element.open = run.state !== "done";
      if (run.state === "done") $("earlier").append(card.element);
      else if (first) $("runs").append(card.element);
      else $("runs").prepend(card.element);
    }
    if (known && known.state !== run.state) {
      say(`${run.id}: ${STATES[run.state]}${run.error ? `. ${run.error}` : ""}`);
      if (run.state === "done") finished(run).catch(() => null); // the next look is another try
    }
    card.update(run);
    card.state = run.state;
  }
  $("earlier").hidden = $("earlier").children.length === 1; // its title
}

function made(run, refresh) {
  const state = el("span", { className: "state" });
  const time = el("span", { className: "soft" });
  const error = el("p", { className: "error" });
  const stages = el("ol", { className: "stages" });
  const loss = el("div", { className: "loss" });
  const pictures = el("div", { className: "pictures" });
  const stop = el("button", { type: "button", onclick: () => act(stop, "DELETE", `/api/runs/${run.id}`) }, "Stop");
  const resume = el("button", { type: "button", onclick: () => act(resume, "POST", `/api/runs/${run.id}/resume`) }, "Go on");
  const summary = el("summary", {}, el("strong", {}, run.id), state, time);
  const element = el("details", { className: "run" }, summary, error, stages, loss, pictures, el("div", { className: "actions" }, stop, resume));
  element.dataset.id = run.id;

  async function act(button, method, url) {
    button.disabled = true;
    try {
      await call(url, { method });
    } catch (problem) {
      tell(error, problem.message);
    }
    await refresh();
  }

  function update(run) {
    state.textContent = STATES[run.state];
    state.dataset.state = run.state;
    time.textContent = run.seconds ? duration(run.seconds) : "";
    tell(error, run.error);
    stages.replaceChildren(...run.stages.map((s) => bar(s, s.name === run.stage && run.state === "running")));
    loss.replaceChildren(...(run.losses.length > 1 ? [curve(run.losses, run.steps)] : []));
    showPictures(pictures, run.pictures);
    stop.hidden = !["running", "queued"].includes(run.state);
    resume.hidden = !["stopped", "failed"].includes(run.state);
    stop.disabled &&= run.state === "running";
    resume.disabled = false;
  }

  return { element, update, state: run.state };
}

function bar({ name, done, total }, active) {
  const title = TITLES[name] ?? name;
  const progress = el("progress", { max: total, value: done, "aria-label": title });
  const item = el("li", { className: done === total ? "done" : active ? "active" : "" }, el("span", {}, title), progress, el("span", { className: "count" }, `${done}/${total}`));
  if (active) item.setAttribute("aria-current", "step");
  return item;
}

function curve(losses, steps) {
  const most = Math.max(...losses.map(([, loss]) => loss)) || 1;
  const points = losses.map(([step, loss]) => `${((step / steps) * 200).toFixed(1)},${(38 - (loss / most) * 36).toFixed(1)}`).join(" ");
  const [step, loss] = losses.at(-1);
  const text = `loss ${loss.toFixed(4)} at step ${step} of ${steps}`;
  const line = svg("polyline", { points, fill: "none", "vector-effect": "non-scaling-stroke" });
  return el("figure", {}, svg("svg", { viewBox: "0 0 200 40", preserveAspectRatio: "none", role: "img", "aria-label": text }, line), el("figcaption", {}, text));
}

// `checkpoint-images/0000100/photo-of-...png` stands under "step 100".
function showPictures(place, urls) {
  if (place.dataset.shown === urls.join()) return;
  place.dataset.shown = urls.join();
  const rows = new Map();
  for (const url of urls) {
    const [folder, step] = url.split("/pictures/")[1].split("/");
    const title = folder === "checkpoint-images" ? `step ${Number(step)}` : folder === "class-images" ? "the class, by the base model" : "first pictures";
    if (!rows.has(title)) rows.set(title, []);
    rows.get(title).push(show(el("img", { alt: `${title}, picture ${rows.get(title).length + 1}` }), url));
  }
  place.replaceChildren(...[...rows].flatMap(([title, images]) => [el("p", { className: "soft" }, title), el("div", { className: "strip" }, ...images)]));
}

function duration(seconds) {
  const whole = Math.round(seconds);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
