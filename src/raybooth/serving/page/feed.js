// Pictures on the page: those that are being drawn, and those that were, a group for each request.

import { $, el, tell } from "./dom.js";
import * as gallery from "./gallery.js";

let again = () => {};

export async function setUp(whenAgain) {
  again = whenAgain;
  $("clear").onclick = async () => {
    if (!confirm("Delete all pictures from this browser?")) return;
    await gallery.forgetAll();
    $("gallery").replaceChildren();
    counted();
  };
  try {
    for (const pictures of await gallery.groups()) {
      const place = groupOf(pictures[0], pictures.some((p) => p.base));
      $("gallery").append(place.element);
      for (const picture of pictures) finished(place.tile(picture.seed), picture);
    }
  } catch {
    unkept();
  }
  counted();
}

// A group at the top, with a tile for each picture that is to come. A tile's methods say how it comes along.
export function add(group, pictures) {
  const place = groupOf({ ...group, seed: pictures[0].seed }, pictures.some((p) => p.base));
  $("gallery").prepend(place.element);
  counted();
  return pictures.map((picture) => coming(place.tile(picture.seed), picture));
}

function coming(tile, picture) {
  const image = el("img", { alt: "", className: "partial" });
  const bar = el("progress", { max: 1, "aria-label": `Picture with seed ${picture.seed}` });
  const note = el("figcaption", {}, caption(picture));
  tile.append(el("div", { className: "frame" }, image), bar, note);
  return {
    drawn: false,
    partial(base64, share) {
      note.textContent = caption(picture);
      image.src = `data:image/png;base64,${base64}`;
      bar.value = share;
    },
    waiting: (why) => (note.textContent = `waiting: ${why}`),
    failed(why) {
      bar.remove();
      note.textContent = why;
    },
    async done(bytes) {
      this.drawn = true;
      picture.bytes = new Blob([bytes]);
      try {
        picture.id = await gallery.keep(picture);
      } catch {
        unkept();
      }
      finished(tile, picture);
    },
  };
}

function groupOf({ title, of, seed, steps, time }, compared) {
  const tiles = el("div", { className: compared ? "tiles compared" : "tiles" });
  const reuse = el("button", { type: "button", onclick: () => again({ title, of, seed, steps }) }, "Use again");
  const remove = el("button", { type: "button", onclick: () => forget(element) }, "Delete");
  const when = new Date(time).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
  const about = [of === "base" ? "base model" : of, steps && `${steps} steps`, when].filter(Boolean).join(" · ");
  const element = el("article", {}, el("header", {}, el("h3", {}, title), el("p", { className: "soft" }, about), el("div", { className: "actions" }, reuse, remove)), tiles);
  return {
    element,
    // Compared, those of one seed stand together.
    tile(seed) {
      const tile = el("figure");
      const last = tiles.lastElementChild;
      if (!compared) tiles.append(tile);
      else if (last?.dataset.seed === String(seed)) last.append(tile);
      else tiles.append(el("div", { className: "twins", "data-seed": seed }, tile));
      return tile;
    },
  };
}

function caption({ base, seed }) {
  return base ? "base model" : `seed ${seed}`;
}

function finished(tile, picture) {
  const url = URL.createObjectURL(new Blob([picture.bytes], { type: "image/png" }));
  const text = caption(picture);
  const full = picture.base ? `base model, seed ${picture.seed}` : text;
  const open = el("button", { type: "button", className: "frame", onclick: () => enlarge(url, picture) }, el("img", { src: url, alt: `${picture.prompt}, ${full}` }));
  const remove = () => forgetOne(tile, url, picture);
  const tools = el("span", { className: "tools" },
    el("a", { href: url, download: file(picture), title: "Download", "aria-label": `Download, ${full}` }, "↓"),
    el("button", { type: "button", title: "Delete", "aria-label": `Delete, ${full}`, onclick: remove }, "×"));
  tile.dataset.id = picture.id ?? "";
  tile.replaceChildren(open, el("figcaption", {}, el("span", {}, text), tools));
}

function enlarge(url, picture) {
  const dialog = $("large");
  Object.assign(dialog.querySelector("img"), { src: url, alt: picture.prompt });
  dialog.querySelector("figcaption").textContent = `${picture.prompt} · ${picture.model} · seed ${picture.seed}`;
  Object.assign(dialog.querySelector("a"), { href: url, download: file(picture) });
  dialog.showModal();
}

function file({ prompt, model, seed }) {
  return `${`${model}-${prompt}`.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 60)}-${seed}.png`;
}

async function forgetOne(tile, url, { id }) {
  if (id) await gallery.forget([id]);
  const article = tile.closest("article");
  tile.remove();
  URL.revokeObjectURL(url);
  if (!article.querySelector("figure")) article.remove();
  counted();
}

async function forget(article) {
  await gallery.forget([...article.querySelectorAll("figure")].map((tile) => Number(tile.dataset.id)).filter(Boolean));
  article.remove();
  counted();
}

function unkept() {
  tell($("gallery-hint"), "This browser keeps nothing for this page: download what you want to have.");
}

function counted() {
  $("clear").hidden = !$("gallery").children.length;
}
