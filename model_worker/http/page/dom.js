// Elements are made here, and texts go into them as texts alone: nothing of this page is ever read as HTML.

/** Return an element. attributes: by name; `on...` are listeners, true is an empty attribute, null leaves one out. */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== null && value !== false && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** Return the element of the page that has an id. */
export const byId = (id) => document.getElementById(id);

/** Return a button that looks like a word. label: what it is called, where its text does not say enough. */
export function wordButton(text, onclick, label = null) {
  return el("button", { type: "button", class: "word", "aria-label": label, onclick }, text);
}

/** Return a bar of a share, from 0 to 1. It is for the eye: its figure stands beside it. */
export function bar(share, kind = "chunk") {
  const filled = el("span", { class: `filled ${kind}` });
  filled.style.width = `${Math.max(0.5, share * 100)}%`;
  return el("span", { class: "meter", "aria-hidden": "true" }, filled);
}
