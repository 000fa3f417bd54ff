// The few marks of Markdown that models write most, as elements: **strong**, `code` and blocks of code. All else is text.

import { el } from "./dom.js";

const MARKS = /```[^\n]*\n([\s\S]*?)(?:```|$)\n?|\*\*([^*\n]+)\*\*|`([^`\n]+)`/g;

/** Return the parts of a text, for `append`. */
export function marked(text) {
  const parts = [];
  let at = 0;
  for (const found of text.matchAll(MARKS)) {
    parts.push(text.slice(at, found.index));
    const [whole, block, strong, code] = found;
    if (block !== undefined) parts.push(el("pre", {}, el("code", {}, block)));
    else parts.push(strong === undefined ? el("code", {}, code) : el("strong", {}, strong));
    at = found.index + whole.length;
  }
  return [...parts, text.slice(at)];
}
