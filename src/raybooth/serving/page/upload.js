// Photographs chosen or dropped, looked at, named, sent.

import { json } from "./server.js";
import { $, el, tell } from "./dom.js";

let chosen = []; // of { file, url }

export function setUp(started) {
  const dialog = $("upload");
  for (const id of ["new-subject", "welcome-new"]) $(id).onclick = () => open();
  $("upload-cancel").onclick = () => dialog.close();
  $("photos").onchange = () => {
    add($("photos").files);
    $("photos").value = ""; // the same file may be chosen again after it was removed
  };
  $("class").oninput = suggestName;
  $("name").oninput = () => ($("name").dataset.own = "yes");
  dropping($("drop"), document.documentElement);
  $("upload-form").onsubmit = (event) => {
    event.preventDefault();
    send(started);
  };
}

export function open() {
  tell($("upload-trouble"), "");
  showChosen();
  if (!$("upload").open) $("upload").showModal();
}

// Pictures may be dropped anywhere on the page.
function dropping(mark, target) {
  target.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    mark.classList.add("over");
  });
  target.addEventListener("dragleave", () => mark.classList.remove("over"));
  target.addEventListener("drop", (event) => {
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    mark.classList.remove("over");
    open();
    add(event.dataTransfer.files);
  });
}

function add(files) {
  for (const file of files) {
    const there = chosen.some(({ file: f }) => f.name === file.name && f.size === file.size && f.lastModified === file.lastModified);
    if (!there) chosen.push({ file, url: URL.createObjectURL(file) });
  }
  showChosen();
}

function remove(one) {
  URL.revokeObjectURL(one.url);
  chosen = chosen.filter((c) => c !== one);
  showChosen();
}

function showChosen() {
  $("previews").replaceChildren(
    ...chosen.map((one) => {
      const image = el("img", { src: one.url, alt: one.file.name });
      image.onerror = () => image.replaceWith(el("span", { className: "nopreview" }, one.file.name)); // HEIC, which few browsers show
      const label = `Remove ${one.file.name}`;
      return el("div", { className: "preview" }, image, el("button", { type: "button", title: label, "aria-label": label, onclick: () => remove(one) }, "×"));
    }),
  );
  $("drop").querySelector("strong").textContent = chosen.length ? `${chosen.length} chosen: add more` : "Choose photographs";
}

function suggestName() {
  const word = $("class").value.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  if (!$("name").dataset.own || !$("name").value) {
    delete $("name").dataset.own;
    $("name").value = word ? `my-${word}` : "";
  }
}

async function send(started) {
  if (!chosen.length) return tell($("upload-trouble"), "Choose some photographs first.");
  const form = new FormData();
  for (const field of ["name", "class", "token"]) form.append(field, $(field).value.trim());
  for (const { file } of chosen) form.append("photos", file);
  $("start").disabled = true;
  $("start").textContent = "Sending…";
  tell($("upload-trouble"), "");
  try {
    const run = await json("/api/runs", { method: "POST", body: form });
    for (const one of [...chosen]) remove(one);
    $("upload-form").reset();
    delete $("name").dataset.own;
    $("upload").close();
    started(run);
  } catch (error) {
    tell($("upload-trouble"), error.message);
  } finally {
    $("start").disabled = false;
    $("start").textContent = "Start";
  }
}
