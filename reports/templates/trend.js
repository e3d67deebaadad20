"use strict";
// Data, per kind of machine: {nights, words, marks: [{n, frozen, why}], series: [{k, a, w, v, b, c, r}]}. A series: k its target, check,
// case, quantity and unit as places in words; a its fragment; w which way is worse; v its values (one number: every night's; text: float32
// in base64; null: none); b [level, low, high] or null; c the rows at which its level changed; r the rows of nights it regressed in.
{
  const form = document.querySelector(".picker");
  const figure = document.querySelector(".chart");
  const list = document.querySelector(".list");
  const body = list.querySelector("tbody");
  const plot = figure.querySelector(".plot");
  const SHOWN = 200; // rows of the list
  let kinds, chosen;
  let seen = false; // whether the chart came into view: drawing takes a second of a slow machine, which opening a page need not wait for
  let order = { by: "changes", down: true };

  const element = (tag, text, name) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  const readable = (x) => {
    if (x === null || Number.isNaN(x)) return "-";
    if (Number.isInteger(x) && Math.abs(x) < 1e9) return String(x);
    return String(Number(x.toPrecision(4)));
  };

  const values = (kind, series) => {
    if (series.values) return series.values;
    const count = kind.nights.length;
    if (series.v === null) series.values = new Float32Array(count).fill(NaN);
    else if (typeof series.v === "number") series.values = new Array(count).fill(series.v);
    else series.values = new Float32Array(Uint8Array.from(atob(series.v), (c) => c.charCodeAt(0)).buffer);
    return series.values;
  };
  const lastOf = (all) => {
    for (let i = all.length - 1; i >= 0; i--) if (!Number.isNaN(all[i])) return all[i];
    return NaN;
  };

  const prepare = () => {
    kinds = JSON.parse(document.getElementById("data").textContent);
    for (const kind of kinds) {
      for (const s of kind.series) {
        const [target, check, which, quantity, unit] = s.k.map((at) => kind.words[at]);
        Object.assign(s, { target, check: which ? `${check} (${which})` : check, plain: check, name: quantity, unit });
        s.text = `${target} ${s.check} ${quantity} ${unit}`.toLowerCase();
        s.last = typeof s.v === "number" ? s.v : null; // of the others when it is asked for
        s.changes = s.c.length;
      }
    }
  };
  const kindNow = () => kinds[Number(form.elements.kind?.value ?? 0)];
  const measure = (kind, s) => {
    if (s.measured) return s;
    s.last = lastOf(values(kind, s));
    s.change = s.b && s.b[0] ? (100 * (s.last - s.b[0])) / Math.abs(s.b[0]) : NaN;
    s.measured = true;
    return s;
  };

  const options = (name, words) => {
    const select = form.elements[name];
    const before = select.value;
    select.replaceChildren(element("option", "all"));
    select.firstChild.value = "";
    for (const word of [...new Set(words)].sort()) {
      const option = element("option", word || "(none)");
      option.value = `=${word}`;
      select.append(option);
    }
    select.value = before;
    if (select.selectedIndex < 0) select.value = "";
  };

  const fill = () => {
    const kind = kindNow();
    const { target, check, text, changed } = form.elements;
    const wanted = text.value.trim().toLowerCase();
    const fitting = kind.series.filter(
      (s) =>
        (!target.value || `=${s.target}` === target.value) &&
        (!check.value || `=${s.plain}` === check.value) &&
        (!changed.checked || s.c.length || s.r.length) &&
        s.text.includes(wanted),
    );
    if (order.by === "last" || order.by === "change") for (const s of fitting) measure(kind, s);
    const way = order.down ? -1 : 1;
    const key = (s) => (order.by === "change" ? Math.abs(s.change) : s[order.by]);
    fitting.sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (typeof x === "string") return way * x.localeCompare(y, "en", { numeric: true });
      return Number.isNaN(x) - Number.isNaN(y) || way * (x - y);
    });
    body.replaceChildren(
      ...fitting.slice(0, SHOWN).map((s) => {
        measure(kind, s);
        const row = element("tr", undefined, s === chosen ? "now" : "");
        const head = element("th");
        head.scope = "row";
        const link = element("a", s.name);
        link.href = `#${s.a}`;
        head.append(link, element("span", [s.target, s.check].filter(Boolean).join(" · "), "quiet where"));
        row.append(
          head,
          element("td", s.target || "-"),
          element("td", s.check),
          element("td", `${readable(s.last)} ${s.unit}`, "number"),
          element("td", Number.isNaN(s.change) ? "-" : `${s.change >= 0 ? "+" : ""}${s.change.toFixed(1)}`, "number"),
          element("td", String(s.changes), "number"),
        );
        return row;
      }),
    );
    form.querySelector("output").textContent = `${fitting.length} of ${kind.series.length} quantities`;
    const more = fitting.length - SHOWN;
    list.querySelector(".more").textContent = more > 0 ? `${more} more: narrow the choice above.` : "";
    return fitting;
  };

  // Plotly reads tags and references in what it is given.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  const remarks = (kind, s) => {
    const said = new Map();
    const add = (row, text) => said.set(row, said.has(row) ? `${said.get(row)}, ${text}` : text);
    for (const mark of kind.marks) add(mark.n, `${mark.frozen ? "frozen" : "accepted"}${mark.why ? `: ${mark.why}` : ""}`);
    for (const row of s.c) add(row, "another level from here on");
    for (const row of s.r) add(row, "found to be worse");
    return said;
  };

  const draw = () => {
    if (!chosen || !seen) return;
    const { kind, series: s } = { kind: chosen.kind, series: chosen };
    const style = getComputedStyle(document.body);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const all = [...values(kind, s)].map((v) => (Number.isNaN(v) ? null : v));
    const rows = all.map((_, i) => i);
    const hover = "%{customdata}<br>%{y:.6g}<extra></extra>";
    const data = [];
    if (s.b && s.b[1] !== s.b[2]) {
      const edge = { type: "scatter", mode: "lines", x: [0, all.length - 1], hoverinfo: "skip", line: { width: 0 } };
      data.push({ ...edge, y: [s.b[1], s.b[1]], showlegend: false });
      data.push({ ...edge, y: [s.b[2], s.b[2]], fill: "tonexty", fillcolor: colour("h1"), name: "noise" });
    }
    if (s.b) data.push({ type: "scatter", mode: "lines", x: [0, all.length - 1], y: [s.b[0], s.b[0]], name: "accepted level", hoverinfo: "skip", line: { color: colour("quiet"), dash: "dash", width: 1.5 } });
    data.push({ type: "scatter", mode: all.length > 120 ? "lines" : "lines+markers", x: rows, y: all, customdata: kind.nights.map(plain), name: "night", hovertemplate: hover, line: { color: colour("h6"), width: 1.6 }, marker: { size: 5 }, connectgaps: false });
    const end = all.findLastIndex((v) => v !== null);
    if (end >= 0) data.push({ type: "scatter", mode: "markers", x: [end], y: [all[end]], customdata: [plain(kind.nights[end])], name: "the last", hovertemplate: hover, showlegend: false, marker: { color: colour("h7"), size: 8 } });
    if (s.r.length) data.push({ type: "scatter", mode: "markers", x: s.r, y: s.r.map((r) => all[r]), customdata: s.r.map((r) => plain(kind.nights[r])), name: "worse", hovertemplate: hover, marker: { color: colour("bad"), symbol: "x", size: 9 } });
    const line = (x, colourName, dash) => ({ type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, line: { color: colour(colourName), width: 1.5, dash } });
    const label = (x, text, colourName) => ({ x, y: 1, xref: "x", yref: "paper", yanchor: "bottom", text, showarrow: false, font: { size: 11, color: colour(colourName) } });
    const step = Math.max(1, Math.ceil(all.length / (plot.clientWidth / 95)));
    const ticks = rows.filter((r) => r % step === 0);
    const axis = { gridcolor: colour("line"), zeroline: false, color: colour("quiet"), automargin: true, fixedrange: true };
    library().react(
      plot,
      data,
      {
        font: { family: style.fontFamily, size: 12, color: colour("ink") },
        paper_bgcolor: "transparent",
        plot_bgcolor: "transparent",
        margin: { l: 8, r: 12, t: 48, b: 8 },
        xaxis: { ...axis, range: [-0.5, all.length - 0.5], tickvals: ticks, ticktext: ticks.map((r) => plain(kind.nights[r])) },
        yaxis: { ...axis, title: { text: plain(s.unit), standoff: 8 } },
        shapes: [...s.c.map((x) => line(x - 0.5, "odd", "dot")), ...kind.marks.map((m) => line(m.n, m.frozen ? "link" : "ok", m.frozen ? "dashdot" : "dash"))],
        annotations: [...kind.marks.map((m) => label(m.n, m.frozen ? "frozen" : "accepted", m.frozen ? "link" : "ok")), ...s.c.map((x) => label(x - 0.5, "change", "odd"))],
        legend: { orientation: "h", x: 0, y: 1.1, yanchor: "bottom" },
        hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { color: colour("paper") } },
        hovermode: "closest",
      },
      { displayModeBar: false, responsive: true },
    );
    plot.dataset.drawn = s.a;
  };

  const choose = (kind, s) => {
    chosen = s;
    s.kind = kind;
    measure(kind, s);
    const words = [s.target, s.check].filter(Boolean).join(" · ");
    figure.hidden = false;
    figure.querySelector("h3").textContent = `${s.name} ${words ? `(${words})` : ""}`;
    const level = s.b ? `; the accepted level is ${readable(s.b[0])}${Number.isNaN(s.change) ? "" : `, ${s.change >= 0 ? "+" : ""}${s.change.toFixed(1)} % from it`}` : "";
    const since = s.c.length ? `; its level changed on ${s.c.map((row) => kind.nights[row]).join(", ")}` : "; no lasting change of level";
    figure.querySelector(".finding").textContent = `Last ${readable(s.last)} ${s.unit}${level}${since}.`;
    const said = remarks(kind, s);
    figure.querySelector("tbody").replaceChildren(
      ...[...values(kind, s)].map((v, row) => {
        const made = element("tr");
        const head = element("th", kind.nights[row]);
        head.scope = "row";
        made.append(head, element("td", readable(v), "number"), element("td", said.get(row) ?? ""));
        return made;
      }).reverse(),
    );
    draw();
    for (const row of body.rows) row.classList.toggle("now", row.querySelector("a").hash === `#${s.a}`);
  };

  const ofAddress = () => {
    const wanted = decodeURIComponent(location.hash.slice(1));
    for (const [place, kind] of kinds.entries()) {
      const found = kind.series.find((s) => s.a === wanted);
      if (!found) continue;
      if (form.elements.kind && form.elements.kind.value !== String(place)) {
        form.elements.kind.value = String(place);
        begin();
      }
      choose(kind, found);
      figure.scrollIntoView({ block: "nearest" });
      return;
    }
  };

  const begin = () => {
    const kind = kindNow();
    options("target", kind.series.map((s) => s.target));
    options("check", kind.series.map((s) => s.plain));
    fill();
  };

  const headers = [...list.querySelectorAll("thead th")];
  for (const header of headers) {
    const button = element("button", header.textContent);
    button.type = "button";
    header.replaceChildren(button);
    button.addEventListener("click", () => {
      const by = header.dataset.by;
      order = { by, down: order.by === by ? !order.down : by === "change" || by === "changes" };
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      fill();
    });
  }

  prepare();
  if (kinds.length && kinds[0].series.length) {
    form.hidden = list.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", (event) => (event.target.name === "kind" ? begin() : fill()));
    begin();
    addEventListener("hashchange", ofAddress);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    // The first finding, or the first of the list, has its room at once: nothing may move under a reader's hand when it is drawn.
    const link = document.querySelector(".findings a[href^='#']") ?? body.querySelector("a");
    const first = kindNow().series.find((s) => `#${s.a}` === link?.getAttribute("href"));
    if (first) choose(kindNow(), first);
    if (location.hash.length > 1) addEventListener("load", () => setTimeout(ofAddress));
    const show = () => {
      seen = true;
      draw();
    };
    new IntersectionObserver((entries, self) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      self.disconnect();
      show();
    }).observe(figure);
    addEventListener("beforeprint", show);
  }
}
