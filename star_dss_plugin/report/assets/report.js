// Controls the list, the open response and the buttons.
(() => {
  const PAGE = 50; // list items in the document, however many responses there are
  const SOURCES = 200; // sources to choose from, the largest ones
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const { make, fixed, sparkline, chart, response, message, highlight } =
    drawing(data.threshold, (piece) => mark(piece));
  const state = { found: [], page: 0, at: -1, piece: -1, query: "" };

  const orders = {
    lowest: (a, b) => a.lowest - b.lowest,
    mixed: (a, b) => b.fall - a.fall,
    mean: (a, b) => a.mean - b.mean,
    below: (a, b) => b.below - a.below,
    long: (a, b) => b.ends.at(-1) - a.ends.at(-1),
    row: () => 0,
  };
  const keyOf = {
    lowest: (r) => `lowest ${fixed(r.lowest)}`,
    mixed: (r) => `fall ${fixed(r.fall)}`,
    mean: (r) => `mean ${fixed(r.mean)}`,
    below: (r) => `${r.below} below`,
    long: (r) => `${r.ends.at(-1)} tokens`,
    row: (r) => `lowest ${fixed(r.lowest)}`,
  };
  const filters = {
    all: () => true,
    crosses: (r) => r.cross !== null,
    mixed: (r) => r.cross > 1,
    safe: (r) => r.cross === null,
  };

  function haystack(r) {
    const before = r.context.map((i) => data.messages[i][1]);
    return (r.hay ??= [r.pieces.join(""), ...before].join("\n").toLowerCase());
  }

  function search() {
    const query = state.query, source = $("source")?.value ?? "";
    const wanted = filters[$("filter").value];
    state.found = data.responses.filter(
      (r) =>
        wanted(r) &&
        (source === "" || r.source === Number(source)) &&
        (query === "" || haystack(r).includes(query)),
    );
    state.found.sort(orders[$("sort").value]);
    select(state.found.length ? 0 : -1);
  }

  const place = (r) => `row ${r.row}` + (r.turn ? `, response ${r.turn + 1}` : "");

  function item(r, at) {
    const where = place(r) + (r.source === undefined ? "" : ` · ${data.sources[r.source]}`);
    const button = make("button", { type: "button" }, sparkline(r));
    if (data.text) {
      const start = r.pieces.slice(0, 40).join("").slice(0, 160);
      button.append(make("span", { class: "snippet secret", dir: "auto" }, start || "(empty)"));
    }
    button.append(make("span", { class: "what" },
      make("span", { dir: "auto" }, where), make("span", {}, keyOf[$("sort").value](r))));
    button.addEventListener("click", () => select(at));
    return make("li", {}, button);
  }

  function list() {
    const total = state.found.length, first = state.page * PAGE;
    const shown = state.found.slice(first, first + PAGE);
    $("list").replaceChildren(...shown.map((r, i) => item(r, first + i)));
    $("list").scrollTop = 0;
    $("status").textContent =
      `${total.toLocaleString("en")} of ${data.responses.length.toLocaleString("en")} responses` +
      (data.demonstration ? " · demonstration scores" : "");
    const pages = Math.max(1, Math.ceil(total / PAGE));
    $("pages").textContent = `page ${state.page + 1} of ${pages}`;
    $("back").disabled = state.page === 0;
    $("next").disabled = state.page + 1 >= pages;
  }

  function select(at, focus = false) {
    const page = Math.max(0, Math.floor(at / PAGE));
    if (page !== state.page || at <= 0 || !$("list").children.length) {
      state.page = page;
      list();
    }
    state.at = at;
    [...$("list").children].forEach((li, i) => {
      const current = i === at - page * PAGE;
      li.firstChild.setAttribute("aria-current", current);
      if (current) scrollTo(li);
      if (current && focus) li.firstChild.focus({ preventScroll: true });
    });
    detail(state.found[at]);
  }

  // Scrolls the list alone: the page must not jump when it opens.
  function scrollTo(li) {
    const box = $("list"), bottom = li.offsetTop + li.offsetHeight;
    if (li.offsetTop < box.scrollTop) box.scrollTop = li.offsetTop;
    else if (bottom > box.scrollTop + box.clientHeight) box.scrollTop = bottom - box.clientHeight;
  }

  function detail(r) {
    const box = $("detail");
    box.classList.remove("revealed");
    state.piece = -1;
    if (!r) {
      box.replaceChildren(make("p", { class: "quiet" }, "No response matches."));
      return;
    }
    const total = r.ends.at(-1);
    const source = r.source === undefined ? "" : ` · ${data.sources[r.source]}`;
    const reveal = make("button", { type: "button", class: "reveal" }, "Reveal this text");
    reveal.addEventListener("click", () => box.classList.toggle("revealed"));
    const b = (text) => make("b", {}, text);
    const crossing = r.cross === null
      ? `never below ${data.threshold}`
      : `below ${data.threshold} from token ${r.cross} of ${total}`;
    const heading = place(r)[0].toUpperCase() + place(r).slice(1) + source;
    const parts = [
      make("div", { class: "title" }, make("h2", { dir: "auto" }, heading), ...(data.text ? [reveal] : [])),
      make("p", { class: "facts quiet", id: "facts" },
        "lowest ", b(fixed(r.lowest)), " · mean ", b(fixed(r.mean)), " · largest fall ",
        b(fixed(r.fall)), " · ", b(crossing), ` · ${r.below} of ${total} tokens below`,
        data.demonstration ? " · demonstration scores" : ""),
    ];
    if (data.text) {
      const note = r.raw ? "Before it, the guard read (decoded tokens: no message matched)"
        : r.context.length ? "Before it, the guard read" : "The guard read nothing before it";
      parts.push(make("h3", {}, note), ...r.context.map((i) => message(data.messages[i])));
    }
    parts.push(make("h3", {}, "The response"), chart(r),
      make("p", { class: "readout quiet", id: "readout" },
        data.text ? "Point at the text or the line, or use ← and →." : "Point at the line, or use ← and →."));
    if (data.text) parts.push(response(r));
    box.replaceChildren(...parts);
    highlight(box.querySelectorAll(".prose"), state.query);
  }

  function mark(piece) {
    const r = state.found[state.at];
    if (!r || piece < 0 || piece >= r.ends.length) return;
    state.piece = piece;
    const start = r.ends[piece - 1] ?? 0, end = r.ends[piece], total = r.ends.at(-1);
    $("here").setAttribute("x", 26 + (850 * start) / total);
    $("here").setAttribute("width", (850 * (end - start)) / total);
    const which = end - start > 1 ? `tokens ${start + 1} to ${end}` : `token ${end}`;
    const by = r.asked ? (r.asked[piece] ? ", by the guard" : ", by the probe") : "";
    $("readout").textContent = `${which}: score ${fixed(r.scores[piece])}${by}`;
    document.querySelector(".marked")?.classList.remove("marked");
    document.querySelector(`#text [data-piece="${piece}"]`)?.classList.add("marked");
  }

  const move = (by, focus) => {
    const at = state.at + by;
    if (at < 0 || at >= state.found.length) return;
    select(at, focus);
    const { top } = $("detail").getBoundingClientRect();
    if (top < 0 || top > innerHeight / 2) document.querySelector(".explorer").scrollIntoView();
  };
  const keys = {
    j: () => move(1), k: () => move(-1),
    ArrowRight: () => mark(state.piece + 1), ArrowLeft: () => mark(state.piece - 1),
    "/": () => $("search")?.focus(),
    r: () => document.body.classList.contains("blurred")
      && $("detail").classList.toggle("revealed"),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.matches("input, select");
    if (typing && event.key === "Escape") event.target.blur();
    const inList = $("list").contains(event.target);
    let action = typing ? undefined : keys[event.key];
    if (inList && event.key === "ArrowDown") action = () => move(1, true);
    if (inList && event.key === "ArrowUp") action = () => move(-1, true);
    if (!action) return;
    event.preventDefault();
    action();
  });

  let waiting = 0;
  $("search")?.addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.query = event.target.value.toLowerCase();
      search();
    }, 120);
  });
  data.sources.slice(0, SOURCES).forEach((name, i) =>
    $("source")?.append(make("option", { value: i }, name)));
  for (const id of ["sort", "filter", "source"]) $(id)?.addEventListener("change", search);
  $("back").addEventListener("click", () => select((state.page - 1) * PAGE));
  $("next").addEventListener("click", () => select((state.page + 1) * PAGE));
  $("blur")?.addEventListener("click", () => {
    const on = document.body.classList.toggle("blurred");
    $("detail").classList.remove("revealed");
    $("blur").setAttribute("aria-pressed", on);
  });
  const root = document.documentElement;
  let dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const theme = () => $("theme").setAttribute("aria-pressed", dark);
  $("theme").addEventListener("click", () => {
    dark = !dark;
    root.dataset.theme = dark ? "dark" : "light";
    theme();
  });
  theme();
  search();
})();
