"use strict";
// Draws one response. Text of the data reaches the page only as text nodes: nothing in these scripts
// parses markup.
function drawing(threshold, mark) {
  const CLIP = 20000; // characters laid out before the reader asks for more
  const SVG = "http://www.w3.org/2000/svg";
  const SVG_TAGS = new Set(["svg", "path", "line", "rect", "circle", "text"]);

  // Attribute names and tags are always literals of this file.
  function make(tag, attributes = {}, ...children) {
    const node = SVG_TAGS.has(tag)
      ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }
  const fixed = (x) => x.toFixed(3);

  function sparkline(r) {
    const total = r.ends.at(-1), stride = Math.ceil(r.ends.length / 80);
    let path = "", x = 0;
    for (let i = 0; i < r.ends.length; i += stride) {
      const last = Math.min(i + stride, r.ends.length) - 1;
      const y = 22 - 20 * Math.min(...r.scores.slice(i, last + 1));
      path += `${path ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
      x = (88 * r.ends[last]) / total;
      path += `L${x.toFixed(1)} ${y.toFixed(1)}`;
    }
    const tau = 22 - 20 * threshold;
    return make("svg", { viewBox: "0 0 88 24", "aria-hidden": "true" },
      make("line", { class: "tau", x1: 0, x2: 88, y1: tau, y2: tau }),
      make("path", { class: "spark", d: path }));
  }

  function chart(r) {
    const left = 26, width = 850, top = 8, height = 110, total = r.ends.at(-1);
    const x = (token) => (left + (width * token) / total).toFixed(1);
    const y = (score) => (top + height * (1 - score)).toFixed(1);
    const line = (score, kind) =>
      make("line", { class: kind, x1: left, x2: left + width, y1: y(score), y2: y(score) });
    let path = "";
    r.ends.forEach((end, i) => {
      path += `${i ? "L" : "M"}${x(r.ends[i - 1] ?? 0)} ${y(r.scores[i])}L${x(end)} ${y(r.scores[i])}`;
    });
    const here = make("rect", { class: "here", id: "here", y: top, height, width: 0 });
    const label = (text, attributes) => make("text", attributes, text);
    const svg = make("svg", { viewBox: "0 0 880 146", role: "img",
      "aria-label": `Score along the ${total} tokens, from ${fixed(r.scores[0])} to ` +
        `${fixed(r.scores.at(-1))}, lowest ${fixed(r.lowest)}` },
      here, line(0, "axis"), line(threshold, "tau"), make("path", { class: "step", d: path }),
      label("1", { x: left - 8, y: top + 5, "text-anchor": "end" }),
      label("0", { x: left - 8, y: top + height + 4, "text-anchor": "end" }),
      label("first token", { x: left, y: 140 }),
      label(`token ${total}`, { x: left + width, y: 140, "text-anchor": "end" }));
    if (r.cross !== null) {
      svg.append(make("circle", { class: "cross", r: 4.5, cx: x(r.cross - 1), cy: y(threshold) }));
    }
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const token = ((((event.clientX - box.left) / box.width) * 880 - left) / width) * total;
      const piece = r.ends.findIndex((end) => end > token);
      mark(piece < 0 ? r.ends.length - 1 : piece);
    });
    return make("div", { class: "chart" }, svg);
  }

  // Only the beginning of a very long text is laid out until the reader asks for all of it.
  function clipped(box, total, fill) {
    if (fill(CLIP) >= total) return box;
    const more = make("button", { type: "button" }, `Show all ${total.toLocaleString("en")} characters`);
    more.addEventListener("click", () => {
      box.replaceChildren();
      fill(Infinity);
      more.remove();
    });
    return make("div", {}, box, more);
  }

  function response(r) {
    const box = make("div", { class: "prose secret", id: "text", dir: "auto" });
    const total = r.pieces.reduce((sum, piece) => sum + piece.length, 0);
    box.addEventListener("pointerover", (event) => {
      if (event.target.dataset.piece) mark(Number(event.target.dataset.piece));
    });
    return clipped(box, total, (limit) => {
      let length = 0;
      const spans = [];
      for (let i = 0; i < r.pieces.length && length < limit; i += 1) {
        const text = r.pieces[i].slice(0, limit - length);
        const begins = (r.ends[i - 1] ?? 0) + 1 === r.cross;
        const kinds = [`h${Math.round(r.scores[i] * 10)}`];
        if (r.scores[i] < threshold) kinds.push("below");
        if (begins) kinds.push("crossed");
        if (r.asked && !r.asked[i]) kinds.push("probed");
        spans.push(make("span", { class: kinds.join(" "), "data-piece": i }, text));
        length += text.length;
      }
      box.append(...spans);
      return length;
    });
  }

  function message([role, content]) {
    const box = make("div", { class: "prose secret", dir: "auto", tabindex: 0 });
    const body = clipped(box, content.length, (limit) => {
      box.append(content.slice(0, limit));
      return Math.min(limit, content.length);
    });
    return make("div", { class: "message" }, make("div", { class: "role" }, role), body);
  }

  // Marks the matches in the open response with the CSS Highlight API, without changing the document.
  function highlight(boxes, query) {
    if (!CSS.highlights) return;
    CSS.highlights.delete("found");
    if (!query) return;
    const ranges = [];
    for (const box of boxes) {
      const nodes = [], walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) nodes.push(walker.currentNode);
      const text = nodes.map((node) => node.data).join("").toLowerCase();
      const ends = [];
      nodes.reduce((sum, node) => (ends.push(sum + node.length), sum + node.length), 0);
      const locate = (range, side, at) => {
        const k = ends.findIndex((end) => at <= end);
        if (k >= 0) range[side](nodes[k], Math.min(at - (ends[k - 1] ?? 0), nodes[k].length));
      };
      for (let at = text.indexOf(query); at >= 0 && ranges.length < 200;
        at = text.indexOf(query, at + query.length)) {
        const range = new Range();
        locate(range, "setStart", at);
        locate(range, "setEnd", at + query.length);
        ranges.push(range);
      }
    }
    CSS.highlights.set("found", new Highlight(...ranges));
  }

  return { make, fixed, sparkline, chart, response, message, highlight };
}
