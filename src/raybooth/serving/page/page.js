// The page: subjects, a prompt, pictures as they arrive, and what was drawn before.

import { draw, json, show } from "./server.js";
import * as code from "./code.js";
import { $, el, say, tell } from "./dom.js";
import { add as addGroup, setUp as setUpFeed } from "./feed.js";
import * as runs from "./runs.js";
import * as upload from "./upload.js";

const IDEAS = ["in the snow", "on the beach", "in the city", "at night", "in the desert", "on the water"];

let subjects = [];
let subject = null;
let drawing = null; // what cancels it
let listed = ""; // the subjects on the page, as the server told of them

// --- subjects

async function loadSubjects(select) {
  const { data } = await json("/v1/models");
  if (JSON.stringify(data) === listed && !select) return;
  listed = JSON.stringify(data);
  subjects = data.sort((a, b) => (a.id === "base") - (b.id === "base") || b.created - a.created);
  const wanted = subjects.find((s) => s.id === (select ?? subject?.id)) ?? subjects[0];
  const focused = $("subject-list").contains(document.activeElement);
  $("subject-list").replaceChildren(...subjects.map((s) => card(s, s === wanted)));
  if (focused) $("subject-list").querySelector(":checked")?.focus();
  $("welcome").hidden = subjects.some((s) => s.id !== "base");
  if (wanted) choose(wanted);
}

function card(one, checked) {
  const base = one.id === "base";
  const radio = el("input", { type: "radio", name: "subject", value: one.id, checked, onchange: () => choose(one) });
  const first = one.photographs?.[0];
  const face = first ? show(el("img", { alt: "" }), first) : el("span", { className: "face", "aria-hidden": "true" }, base ? "∅" : one.id[0]);
  const words = base ? "as it came" : `${one.class || one.kind || ""}`;
  return el("label", { className: "subject" }, radio, face, el("span", {}, el("strong", {}, base ? "base model" : one.id), el("span", { className: "soft" }, words)));
}

function choose(one) {
  const before = subject;
  subject = one;
  const prompt = $("prompt");
  if (!prompt.value) prompt.value = opening(one);
  else if (before && prompt.value.startsWith(opening(before))) prompt.value = opening(one) + prompt.value.slice(opening(before).length);
  else if (before && name(before) && name(one)) prompt.value = prompt.value.replaceAll(name(before), () => name(one));
  const photographs = (one.photographs ?? []).slice(0, 10);
  $("photographs").replaceChildren(...photographs.map((url, i) => show(el("img", { alt: `photograph ${i + 1} of ${one.id}` }), url)));
  $("compare-label").hidden = one.id === "base";
  changed();
}

const opening = (one) => one.prompt || "photo of a dog";
const name = (one) => [one.token, one.class].filter(Boolean).join(" ");

// As the server does it.
function filled(prompt, one) {
  const words = { "{subject}": name(one), "{token}": one.token, "{class}": one.class };
  return one.token ? prompt.replace(/\{(subject|token|class)\}/g, (word) => words[word]) : prompt;
}

// The token means nothing to the base model: there the class stands alone.
function withoutToken(prompt, one) {
  return one.token ? filled(prompt, one).split(one.token).join(" ").replace(/\s+/g, " ").replace(/ ([,.;:!?])/g, "$1").trim() : prompt;
}

async function waitFor(id) {
  for (let attempt = 0; attempt < 60; attempt++) {
    await loadSubjects(id);
    if (subjects.some((s) => s.id === id)) {
      say(`${id} is ready: draw it.`);
      return $("prompt").focus({ preventScroll: false });
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
  }
}

// --- the request

function request() {
  const steps = $("steps").valueAsNumber;
  return { model: subject?.id ?? "base", prompt: $("prompt").value.trim(), n: $("n").valueAsNumber || 1, seed: $("seed").valueAsNumber || 0, ...(steps ? { steps } : {}) };
}

function changed() {
  const prompt = $("prompt").value;
  const unnamed = subject?.token && prompt && !filled(prompt, subject).includes(subject.token);
  tell($("hint"), unnamed ? `Without “${name(subject)}” in it, this draws any ${subject.class || "thing"}.` : "");
  const comparing = $("compare").checked && subject?.id !== "base";
  tell($("compare-hint"), comparing ? `The base model has not learnt the word: it draws “${withoutToken(prompt, subject ?? {})}”, with the same seed.` : "");
  for (const chip of $("ideas").children) chip.setAttribute("aria-pressed", prompt.endsWith(chip.textContent));
  const language = document.querySelector("[name=language]:checked").value;
  $("snippet").textContent = code[language](request());
}

function suggest(idea) {
  const prompt = $("prompt");
  const present = IDEAS.find((i) => prompt.value.endsWith(` ${i}`));
  const bare = present ? prompt.value.slice(0, -present.length - 1) : prompt.value.trimEnd();
  prompt.value = present === idea ? bare : `${bare} ${idea}`;
  changed();
}

const roll = () => {
  $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 1_000_000; // short enough to be read out
  changed();
};

// --- drawing

async function submit() {
  if (drawing) return; // Enter asks the form, and not its button, which is off by now
  if ($("fresh").checked) roll();
  const wanted = request();
  const requests = [wanted];
  if ($("compare").checked && wanted.model !== "base") requests.push({ ...wanted, model: "base", prompt: withoutToken(wanted.prompt, subject) });
  const group = { group: crypto.randomUUID?.() ?? String(Math.random()), time: Date.now(), of: wanted.model, title: wanted.prompt, steps: wanted.steps ?? null };
  const pictures = [...Array(wanted.n).keys()].flatMap((i) => requests.map(({ model, prompt, seed }) => ({ ...group, model, prompt, seed: seed + i, base: model !== wanted.model })));
  drawing = new AbortController();
  $("draw").disabled = true;
  $("cancel").hidden = false;
  tell($("trouble"), "");
  say(`Drawing ${pictures.length === 1 ? "a picture" : `${pictures.length} pictures`}.`);
  const tiles = addGroup(group, pictures);
  const ended = await Promise.allSettled(requests.map((r, k) => fill(tiles.filter((_, i) => i % requests.length === k), r, drawing.signal)));
  say(`${tiles.filter((t) => t.drawn).length} of ${pictures.length} pictures drawn.`);
  const wrong = ended.find((e) => e.reason && e.reason.name !== "AbortError");
  tell($("trouble"), wrong?.reason.message);
  drawing = null;
  $("draw").disabled = false;
  $("cancel").hidden = true;
}

async function fill(tiles, request, signal) {
  const kept = [];
  try {
    await draw(request, {
      signal,
      partial: (i, base64, share) => tiles[i].partial(base64, share),
      done: (i, base64) => kept.push(tiles[i].done(Uint8Array.from(atob(base64), (c) => c.charCodeAt(0)))),
      waiting: (why) => tiles.forEach((t) => t.waiting(why)),
    });
  } finally {
    await Promise.all(kept);
    for (const tile of tiles) if (!tile.drawn) tile.failed(signal.aborted ? "cancelled" : "not drawn");
  }
}

function again({ title, of, seed, steps }) {
  const known = subjects.find((s) => s.id === of);
  if (known) document.querySelectorAll("[name=subject]").forEach((radio) => (radio.checked = radio.value === of));
  if (known) choose(known);
  $("prompt").value = title;
  $("seed").value = seed;
  $("steps").value = steps ?? "";
  $("fresh").checked = false;
  changed();
  $("prompt").focus();
  scrollTo({ top: 0 });
}

// --- all together

$("ideas").append(...IDEAS.map((idea) => el("button", { type: "button", className: "chip", "aria-pressed": false, onclick: () => suggest(idea) }, idea)));
$("compose").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
$("compose").oninput = changed;
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("compose").requestSubmit();
  }
};
$("dice").onclick = () => {
  roll();
  $("fresh").checked = false;
};
$("cancel").onclick = () => drawing?.abort();
$("copy").onclick = code.copy;

roll();
setUpFeed(again);
const own = new Set(JSON.parse(sessionStorage.getItem("raybooth-runs") ?? "[]")); // runs that were started in this tab: they are waited for
const refreshRuns = runs.setUp((run) => (own.has(run.id) ? waitFor(run.id) : loadSubjects()), () => loadSubjects());
upload.setUp((run) => {
  own.add(run.id);
  sessionStorage.setItem("raybooth-runs", JSON.stringify([...own]));
  say(`${run.id} begins to learn.`);
  refreshRuns();
});
try {
  await loadSubjects();
} catch (error) {
  tell($("trouble"), error.message);
}
refreshRuns();
