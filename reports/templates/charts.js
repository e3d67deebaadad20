"use strict";
// Draws every <div class="plot" data-figure="NAME"> from the figures of the page when it comes into view, in its colours.
const charts = (() => {
  const drawn = new Set();
  let figures;

  const figure = (name) => {
    figures ??= JSON.parse(document.getElementById("figures").textContent);
    return structuredClone(figures[name]);
  };

  const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
  const merged = (base, over) => {
    const both = { ...base };
    for (const [key, value] of Object.entries(over)) {
      both[key] = isObject(value) && isObject(both[key]) ? merged(both[key], value) : value;
    }
    return both;
  };

  const themed = (data, layout) => {
    const style = getComputedStyle(document.body);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    for (const trace of data) {
      if (trace.hue === undefined) continue;
      const hue = colour(`s${trace.hue % 6}`);
      delete trace.hue;
      trace.marker = { ...trace.marker, color: hue };
      if (trace.marker.pattern) trace.marker.pattern = { ...trace.marker.pattern, fgcolor: colour("card"), fillmode: "overlay" };
      if (trace.type === "scatter") trace.line = { ...trace.line, color: hue };
      if (trace.error_x) trace.error_x = { ...trace.error_x, color: hue, thickness: 2, width: 5 };
    }
    const lines = { gridcolor: colour("line"), zerolinecolor: colour("line") };
    const quiet = { color: colour("quiet"), exponentformat: "power", fixedrange: true, ...lines };
    for (const axis of ["xaxis", "yaxis"]) layout[axis] ??= {};
    for (const key of Object.keys(layout)) {
      if (/^[xy]axis\d*$/.test(key)) layout[key] = merged({ ...quiet, automargin: true, title: { standoff: 8 } }, layout[key]);
    }
    for (const shape of layout.shapes ?? []) shape.line = { color: colour("quiet"), width: 1, dash: "dot", ...shape.line };
    const scale = Array.from({ length: 10 }, (_, i) => [i / 9, colour(`h${i}`)]);
    const bar = { thickness: 12, outlinewidth: 0, tickcolor: colour("quiet"), tickfont: { color: colour("quiet") } };
    if (layout.coloraxis) layout.coloraxis = merged({ colorscale: scale, colorbar: bar }, layout.coloraxis);
    return merged(
      {
        font: { family: style.fontFamily, size: 12, color: colour("ink") },
        paper_bgcolor: "transparent",
        plot_bgcolor: "transparent",
        margin: { l: 8, r: 8, t: 8, b: 8 },
        hoverlabel: { bgcolor: colour("ink"), bordercolor: colour("ink"), font: { color: colour("paper") } },
        legend: { orientation: "h", x: 0, y: 1, xanchor: "left", yanchor: "bottom" },
        showlegend: data.length > 1 && !layout.coloraxis,
      },
      layout,
    );
  };

  // Numbers in the cells of a heat map: dark on light cells and light on dark ones, whatever the scheme.
  const numbered = (trace, layout) => {
    const values = trace.z.flat().filter((value) => value !== null);
    const low = layout.coloraxis.cmin ?? Math.min(...values);
    const high = layout.coloraxis.cmax ?? Math.max(...values);
    const style = getComputedStyle(document.documentElement);
    const cells = trace.z.flatMap((row, y) => row.map((value, x) => ({ x: trace.x[x], y: trace.y[y], value })));
    const seen = cells.filter(({ value }) => value !== null);
    const dark = ({ value }) => (high > low ? (value - low) / (high - low) : 0) < 0.5;
    return {
      type: "scatter", mode: "text", hoverinfo: "skip", showlegend: false, xaxis: trace.xaxis, yaxis: trace.yaxis,
      x: seen.map(({ x }) => x), y: seen.map(({ y }) => y), text: seen.map(({ value }) => `${Number(value.toPrecision(3))}`),
      textfont: { size: 11, color: seen.map((cell) => style.getPropertyValue(dark(cell) ? "--h-low" : "--h-high").trim()) },
    };
  };

  const NARROW = 480; // px: a phone
  const draw = (plot) => {
    const { data, layout } = figure(plot.dataset.figure);
    const shown = themed(data, layout);
    const narrow = plot.clientWidth < NARROW;
    if (narrow && layout.coloraxis) shown.coloraxis.showscale = false; // there the cells' room is worth more
    for (const trace of data.filter((one) => one.type === "heatmap" && one.numbers)) {
      delete trace.numbers;
      if (!narrow || trace.x.length <= 5) data.push(numbered(trace, shown));
    }
    if (narrow && shown.showlegend) plot.style.height = `${Number(plot.dataset.height) + data.length}rem`;
    library().react(plot, data, shown, { displayModeBar: false, responsive: true });
    plot.dataset.drawn = "";
    drawn.add(plot);
  };

  const plots = (within = document) => [...within.querySelectorAll(".plot[data-figure]")];
  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        watcher.unobserve(target);
        if (!drawn.has(target)) draw(target);
      }
    },
    { rootMargin: "300px" },
  );
  for (const plot of plots()) {
    plot.style.height = `${plot.dataset.height ?? 20}rem`; // before it is drawn, so that nothing moves when it is
    watcher.observe(plot);
  }

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));

  // Paper is white and of its own width: whatever was not looked at yet is drawn for it, and drawn back afterwards.
  const paper = (printing) => {
    document.documentElement.classList.toggle("paper", printing);
    for (const plot of printing ? plots() : drawn) {
      plot.style.width = printing ? "42rem" : "";
      if (plot.offsetParent) draw(plot);
      else if (!printing) { // folded: to be drawn again when it is opened
        drawn.delete(plot);
        watcher.observe(plot);
      }
    }
  };
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));

  return { draw, plots };
})();
