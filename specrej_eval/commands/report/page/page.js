"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const find = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  /** An element with text and children; text is never markup. */
  function make(name, attributes = {}, ...children) {
    const element = attributes.svg ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key !== "svg" && value !== null && value !== undefined) element.setAttribute(key, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }
  const draw = (name, attributes, ...children) => make(name, { svg: true, ...attributes }, ...children);

  // light and dark

  find("#theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  });

  // tables that sort; a row's open text stays below its row

  function sortBy(table, column, direction) {
    const body = table.tBodies[0];
    const groups = [];
    for (const row of body.rows) {
      if (row.classList.contains("text")) groups[groups.length - 1].push(row);
      else groups.push([row]);
    }
    const value = ([row]) => {
      const cell = row.cells[column];
      return cell.dataset.value === undefined ? (cell.textContent === "-" || cell.textContent === "–" ? null : cell.textContent) : Number(cell.dataset.value);
    };
    const keyed = groups.map((group, place) => ({ group, place, key: value(group) }));
    keyed.sort((one, other) => {
      if (one.key === null || other.key === null) return (one.key === null) - (other.key === null) || one.place - other.place;
      const order = typeof one.key === "number" && typeof other.key === "number"
        ? one.key - other.key
        : String(one.key).localeCompare(String(other.key), "en", { numeric: true });
      return direction * order || one.place - other.place;
    });
    body.append(...keyed.flatMap(({ group }) => group));
    all("thead th", table).forEach((head, place) => {
      if (place === column) head.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.sort");
    if (button) {
      const head = button.closest("th");
      const now = head.getAttribute("aria-sort");
      const first = head.classList.contains("number") ? -1 : 1;
      sortBy(head.closest("table"), head.cellIndex, now === null ? first : now === "ascending" ? -1 : 1);
    }
    const copy = event.target.closest("button.copy");
    if (copy) copyText(copy, find(`#${copy.dataset.copy}`));
  });

  async function copyText(button, source) {
    const label = button.dataset.label ?? (button.dataset.label = button.textContent);
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "Copied";
    } catch {
      const range = document.createRange();
      range.selectNodeContents(source);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      button.textContent = "Selected: copy it with the keyboard";
    }
    setTimeout(() => { button.textContent = label; }, 2000);
  }

  // the viewer of rows

  const { methods, prompts } = JSON.parse(find("#rows").textContent);
  const chosen = find("#prompt");
  const order = find("#order");
  const sides = all(".side").map((side) => ({ select: find(".method", side), panel: find(".panel", side) }));
  const MOST_COLUMNS = 6;
  const MOST_LINES = 400;

  const tell = (value, digits = 3) => value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");

  if (!prompts.length || !methods.length) {
    find(".sides").replaceChildren(make("p", {}, "No rows are in this page."));
    return;
  }
  const withRows = methods.map((method, place) => prompts.some((prompt) => prompt.by[place] && prompt.by[place].rows.length));
  sides.forEach(({ select }, place) => {
    select.append(...methods.map((method, number) => make("option", { value: number }, method.name)));
    const usable = methods.map((_, number) => number).filter((number) => withRows[number]);
    const wanted = ["best_of_n", "rejecting"][place];
    // the first of each kind on its side; else whatever else has rows
    const fitting = usable.filter((number) => methods[number].family === wanted);
    const other = usable.filter((number) => String(number) !== (place ? sides[0].select.value : ""));
    select.value = String(fitting.at(-1) ?? other[0] ?? usable[0] ?? 0);
    if (place && select.value === sides[0].select.value && other.length) select.value = String(other[0]);
    select.addEventListener("change", () => { if (order.value === "gap") list(); show(); });
  });
  if (methods.length < 2) sides[1].select.closest(".side").hidden = true;

  function gap(prompt) {
    const [left, right] = sides.map(({ select }) => prompt.by[select.value]);
    if (!left || !right || left.reward === null || right.reward === null) return -1;
    return Math.abs(left.reward - right.reward);
  }

  function list() {
    const kept = chosen.value;
    const numbered = prompts.map((prompt, place) => ({ prompt, place }));
    if (order.value === "gap") numbered.sort((one, other) => gap(other.prompt) - gap(one.prompt) || one.place - other.place);
    chosen.replaceChildren(...numbered.map(({ prompt, place }) =>
      make("option", { value: place }, `${place + 1}. ${prompt.task ? `${prompt.task}: ` : ""}${prompt.name}`)));
    chosen.value = order.value === "run" && kept !== "" ? kept : chosen.options[0].value;
  }

  function step(by) {
    const next = chosen.selectedIndex + by;
    if (next >= 0 && next < chosen.options.length) {
      chosen.selectedIndex = next;
      show();
    }
  }

  function show() {
    const prompt = prompts[Number(chosen.value)];
    find("#question").textContent = prompt.text ?? prompt.name;
    find("#previous").disabled = chosen.selectedIndex === 0;
    find("#next").disabled = chosen.selectedIndex === chosen.options.length - 1;
    const shown = sides.map(({ select }) => prompt.by[select.value]);
    const range = bounds(shown.filter(Boolean));
    sides.forEach(({ select, panel }, place) => {
      panel.replaceChildren(...side(methods[Number(select.value)], shown[place], range, panel.clientWidth));
    });
  }

  /** One scale for both sides. */
  function bounds(answers) {
    const points = answers.flatMap((answer) => answer.rows.flatMap((row) => [...row[5], [row[2], row[3]]]));
    const scores = points.map(([, score]) => score).filter((score) => score !== null);
    if (!scores.length) return null;
    const low = scores.reduce((a, b) => Math.min(a, b));
    const high = scores.reduce((a, b) => Math.max(a, b));
    const room = (high - low) * 0.08 || 1;
    return { low: low - room, high: high + room, tokens: points.reduce((most, [tokens]) => Math.max(most, tokens), 1) };
  }

  const RANK = { won: 0, finished: 1, length: 2, rejected: 3 };
  const FATE = { won: "won", finished: "finished", length: "at the limit", rejected: "rejected" };

  function side(method, answer, range, width) {
    if (!answer) return [make("p", {}, "This run has not answered this prompt.")];
    const rows = answer.rows.map(([row, fate, tokens, reward, survived, looks, text]) => ({
      row, tokens, reward, survived, looks, text, fate: row === answer.best ? "won" : fate,
      early: fate === "rejected" ? looks : looks.filter(([at]) => at < tokens),
    }));
    rows.sort((one, other) => RANK[one.fate] - RANK[other.fate] || other.survived - one.survived
      || (other.reward ?? -Infinity) - (one.reward ?? -Infinity) || one.row - other.row);
    const rejected = rows.filter((row) => row.fate === "rejected").length;
    const fact = (name, value) => make("li", {}, `${name} `, make("b", {}, value));
    const facts = make("ul", { class: "facts" },
      fact("reward", tell(answer.reward)),
      ...answer.scores.map(([name, value]) => fact(name, String(value))),
      fact("tokens", String(answer.tokens)),
      fact("decoded in all", answer.decoded.toLocaleString("en")),
      rows.length ? fact("rows", String(rows.length)) : null,
      rows.length ? fact("rejected", String(rejected)) : null);
    const won = rows.find((row) => row.fate === "won");
    const text = won ? won.text : answer.text;
    const quote = make("div", { class: `answer ${method.family}` },
      make("h4", {}, won ? `the answer: row ${won.row}` : "the answer"),
      text === undefined ? make("p", { class: "note" }, "Its text is not in this page.") : make("pre", {}, text));
    if (!rows.length) return [facts, quote, make("p", { class: "note" }, "The rows behind it are not recorded.")];
    return [facts, quote, ...(range ? [legend(method), chart(method, rows, range, width)] : []), table(rows)];
  }

  function legend(method) {
    return make("div", { class: "legend" },
      make("span", {}, "score against tokens"), make("span", {}, "thick: the answer"),
      make("span", {}, "thin: finished"), make("span", {}, "grey ×: rejected"));
  }

  function niceStep(rough) {
    const power = 10 ** Math.floor(Math.log10(rough));
    return [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((step) => step >= rough * 0.999);
  }

  function ticks(low, high, most) {
    const step = niceStep((high - low) / most);
    const found = [];
    for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9; place += 1) found.push(place * step);
    return found;
  }

  function chart(method, rows, range, width) {
    const height = 230;
    const wide = Math.max(260, width);
    const left = 44, right = wide - 60, top = 10, bottom = height - 40;
    const x = (tokens) => left + (tokens / range.tokens) * (right - left);
    const y = (score) => bottom - ((score - range.low) / (range.high - range.low)) * (bottom - top);
    const at = (number) => String(Math.round(number * 100) / 100);
    const svg = draw("svg", { class: "chart looks", role: "img", viewBox: `0 0 ${wide} ${height}`, height },
      draw("title", {}, `scores of the rows of ${method.name}`));
    for (const tick of ticks(range.low, range.high, 5)) {
      svg.append(draw("line", { class: "s-grid", x1: left, x2: right, y1: at(y(tick)), y2: at(y(tick)) }),
        draw("text", { class: "f-soft", x: left - 7, y: at(y(tick) + 4), "text-anchor": "end" }, String(+tick.toPrecision(6)).replace("-", "−")));
    }
    svg.append(draw("line", { class: "s-pale", x1: left, x2: right, y1: bottom, y2: bottom }));
    for (const tick of ticks(0, range.tokens, wide > 420 ? 6 : 4)) {
      svg.append(draw("text", { class: "f-soft", x: at(x(tick)), y: bottom + 17, "text-anchor": "middle" }, String(+tick.toPrecision(6))));
    }
    svg.append(draw("text", { class: "f-soft", x: right, y: bottom + 34, "text-anchor": "end" }, "tokens"));
    for (const row of rows.slice(0, MOST_LINES).reverse()) {
      const points = row.looks.filter(([, score]) => score !== null);
      if (!points.length) continue;
      const role = row.fate === "rejected" ? "pale" : method.family;
      const [tokens, score] = points[points.length - 1];
      const title = draw("title", {}, `row ${row.row}: ${FATE[row.fate]}, ${tell(score)} at ${tokens} tokens`);
      svg.append(draw("polyline", { class: `line s-${role}`, "stroke-width": row.fate === "won" ? 2.6 : 1.1,
        points: points.map(([at_, score_]) => `${at(x(at_))},${at(y(score_))}`).join(" ") }));
      if (row.fate === "rejected") {
        const [cx, cy] = [x(tokens), y(score)];
        svg.append(draw("path", { class: "line s-pale", "stroke-width": 1.6,
          d: `M${at(cx - 3)} ${at(cy - 3)}l6 6m0 -6l-6 6` }, title));
      } else {
        svg.append(draw("circle", { class: `f-${role}`, cx: at(x(tokens)), cy: at(y(score)), r: row.fate === "won" ? 5 : 2.8 }, title));
      }
      if (row.fate === "won") {
        svg.append(draw("text", { class: `f-${role} bold`, x: at(x(tokens) + 9), y: at(y(score) + 4) }, `row ${row.row}`));
      }
    }
    return svg;
  }

  function table(rows) {
    // a row's n-th early score stands in column n; of many, some, evenly picked
    const longest = rows.reduce((most, row) => Math.max(most, row.early.length), 0);
    const count = Math.min(longest, MOST_COLUMNS);
    const columns = Array.from({ length: count }, (_, place) => Math.floor((place * longest) / count));
    const heading = (place) => {
      const at = new Set(rows.filter((row) => row.early[place]).map((row) => row.early[place][0]));
      return at.size === 1 ? `at ${[...at][0]}` : `look ${place + 1}`;
    };
    const head = (name, number = true) => make("th", { scope: "col", class: number ? "number" : "words" },
      make("button", { type: "button", class: "sort" }, name));
    const heads = [head("row", false), head("fate", false), head("tokens"), head("final"), ...columns.map((place) => head(heading(place)))];
    const body = make("tbody");
    for (const row of rows) {
      const final = row.fate === "rejected" ? null : row.reward;
      const cell = (value, text, look = "") => make("td", { class: `number${look}`, "data-value": value }, text);
      const open = make("button", { type: "button", "aria-expanded": "false" }, String(row.row));
      const line = make("tr", { class: `row ${row.fate}` },
        make("th", { scope: "row", "data-value": row.row }, open),
        make("td", {}, FATE[row.fate]), cell(row.tokens, String(row.tokens)), cell(final, tell(final)),
        ...columns.map((place) => {
          const found = row.early[place];
          const last = row.fate === "rejected" && place === row.early.length - 1;
          return found ? cell(found[1], tell(found[1]), last ? " cut" : "") : cell(null, "–");
        }));
      line.addEventListener("click", () => toggle(line, open, row, heads.length));
      body.append(line);
    }
    return make("div", { class: "scroll" }, make("table", { class: "rows" }, make("thead", {}, make("tr", {}, ...heads)), body));
  }

  function toggle(line, button, row, columns) {
    const opened = line.nextElementSibling;
    if (opened && opened.classList.contains("text")) {
      opened.remove();
      button.setAttribute("aria-expanded", "false");
      return;
    }
    button.setAttribute("aria-expanded", "true");
    const text = row.text === undefined ? make("p", { class: "note" }, "Its text is not in this page.") : make("pre", {}, row.text);
    line.after(make("tr", { class: "text" }, make("td", { colspan: columns }, text)));
  }

  chosen.addEventListener("change", show);
  order.addEventListener("change", () => { list(); show(); });
  find("#previous").addEventListener("click", () => step(-1));
  find("#next").addEventListener("click", () => step(1));
  let waiting = 0;
  let drawnAt = innerWidth;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { if (innerWidth !== drawnAt) { drawnAt = innerWidth; show(); } }, 150);
  });
  list();
  show();
})();
