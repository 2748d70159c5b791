// Elements from data. Text goes in as text and never as HTML, so no name or prompt can become code.

export const $ = (id) => document.getElementById(id);

// el("p", { className: "soft", onclick }, "text", child): properties, except aria-* and data-*, which are attributes.
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((c) => c !== null && c !== undefined));
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// A sentence in its place, or nothing.
export function tell(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

// For those who listen to the page.
export function say(text) {
  $("said").textContent = text;
}
