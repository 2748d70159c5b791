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
const STATES = { queued: "waits its turn", running: "running", done: "ready", failed: "failed", stopped: "stopped" };

const cards = new Map(); // id -> what is on the page of a run
let timer = null;
let trouble = null;

// `finished(run)` hears of every run that becomes ready while the page is open.
export function setUp(finished) {
  const refresh = async () => {
    clearTimeout(timer);
    let runs = [];
    try {
      ({ runs } = await json("/api/runs"));
      trouble?.remove();
      trouble = null;
    } catch (error) {
      if (error.status === 404) return without(); // a server that starts no runs
      if (!trouble) $("runs").prepend((trouble = el("p", { className: "soft" }, error.message)));
      timer = setTimeout(refresh, 5000);
      return;
    }
    showAll(runs, finished, refresh);
    if (runs.some((r) => r.state === "running" || r.state === "queued")) timer = setTimeout(refresh, 1000);
  };
  return refresh;
}

function without() {
  $("new-subject").hidden = $("welcome").hidden = true;
}

function showAll(runs, finished, refresh) {
  const shown = new Set(runs.map((r) => r.id));
  const first = cards.size === 0;
  for (const [id, card] of cards) if (!shown.has(id)) card.element.remove();
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
      if (run.state === "done") finished(run);
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
