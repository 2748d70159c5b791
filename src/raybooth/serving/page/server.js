// The server: requests with the key if it wants one, pictures, and streams of events.

import { $ } from "./dom.js";

const KEY = "raybooth-key";
let asking = null;

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

export class Refusal extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter; // seconds
  }
}

// One question, however many requests wait for the answer. It is asked again when the key of `used` was not accepted.
function askForKey(used) {
  if (sessionStorage.getItem(KEY) !== used) return Promise.resolve(); // another request has got a newer one meanwhile
  asking ??= new Promise((resolve) => {
    const dialog = $("key");
    $("key-trouble").hidden = !used;
    dialog.returnValue = "";
    dialog.onclose = () => {
      asking = null;
      const given = $("key-input").value.trim();
      $("key-input").value = "";
      if (given && dialog.returnValue === "given") sessionStorage.setItem(KEY, given);
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}

export async function call(url, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(url, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal(0, "The server does not answer. Is it still running?");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      await askForKey(key);
      if (sessionStorage.getItem(KEY) !== key) continue;
    }
    throw await refusal(response);
  }
}

export async function json(url, options) {
  return (await call(url, options)).json();
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? (typeof body?.detail === "string" ? body.detail : `The server answers ${response.status} ${response.statusText}`);
  return new Refusal(response.status, message, Number(response.headers.get("Retry-After")) || null);
}

// An <img> cannot send a key: pictures are fetched, once each.
const pictures = new Map();

export function picture(url) {
  if (!pictures.has(url)) {
    const made = call(url).then((r) => r.blob()).then((blob) => URL.createObjectURL(blob));
    made.catch(() => pictures.delete(url));
    pictures.set(url, made);
  }
  return pictures.get(url);
}

export function show(image, url) {
  picture(url).then((src) => (image.src = src), () => image.classList.add("absent"));
  return image;
}

// Server-sent events of a response, as the JSON of their data.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    text += value ?? "";
    const blocks = text.split(/\r?\n\r?\n/);
    text = done ? "" : blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((l) => l.startsWith("data:")).map((l) => l.slice(5).trim()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
    if (done) return;
  }
}

// The n pictures of a request: `partial(i, base64, share)` hears of them as they clear up, `done(i, base64)` when they are, `waiting(why)` of a busy server.
export async function draw(request, { signal, partial, done, waiting }) {
  const asked = 3;
  const body = JSON.stringify({ ...request, response_format: "b64_json", stream: true, partial_images: asked });
  const options = { method: "POST", headers: { "Content-Type": "application/json" }, body, signal };
  const response = await patiently(() => call("/v1/images/generations", options), signal, waiting);
  for await (const event of events(response)) {
    if (event.error) throw new Refusal(response.status, event.error.message);
    if (event.type === "image_generation.partial_image") partial(event.index, event.b64_json, (event.partial_image_index + 1) / (asked + 1));
    if (event.type === "image_generation.completed") done(event.index, event.b64_json);
  }
}

async function patiently(work, signal, waiting) {
  for (let attempt = 0; ; attempt++) {
    try {
      return await work();
    } catch (error) {
      if (![429, 503].includes(error.status) || attempt === 20) throw error;
      const seconds = Math.min(error.retryAfter ?? 2, 30);
      waiting(error.message);
      await pause(seconds * 1000, signal);
    }
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("cancelled", "AbortError"));
    });
  });
}
