"use strict";
// Plotly is text until the first chart wants it: a second of a slow machine that opening a page need not wait for. An inlined script runs
// at once, named by its hash like the others.
const library = () => {
  if (!window.Plotly) {
    const run = document.createElement("script");
    run.textContent = document.getElementById("library").textContent;
    document.head.append(run);
  }
  return window.Plotly;
};
