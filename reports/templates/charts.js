"use strict";
// Draws every <div class="plot" data-figure="NAME"> from the figures of the page when it comes into view, in its colours.
const charts = (() => {
  const drawn = new Set();
  let figures;

  // The library is text until the first chart wants it: an inlined script runs at once, named by its hash like the others.
  const library = () => {
    if (!window.Plotly) {
      const run = document.createElement("script");
      run.textContent = document.getElementById("library").textContent;
      document.head.append(run);
    }
    return window.Plotly;
  };
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
    const quiet = { color: colour("quiet"), gridcolor: colour("line"), zerolinecolor: colour("line"), fixedrange: true };
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

  const draw = (plot) => {
    const { data, layout } = figure(plot.dataset.figure);
    library().react(plot, data, themed(data, layout), { displayModeBar: false, responsive: true });
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
