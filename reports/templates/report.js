"use strict";
{
  const checks = [...document.querySelectorAll(".check")];
  const groups = [...document.querySelectorAll(".suite"), ...document.querySelectorAll(".target")];
  const form = document.querySelector(".filter");
  const words = new Map();

  // What the text filter looks in: all but the rows of big tables.
  const wordsOf = (check) => {
    if (!words.has(check)) {
      const parts = check.querySelectorAll("summary, pre, .measurements, .where");
      words.set(check, [...parts].map((part) => part.textContent).join(" ").toLowerCase());
    }
    return words.get(check);
  };

  const filter = () => {
    const outcome = form.elements.outcome.value;
    const text = form.elements.text.value.trim().toLowerCase();
    let shown = 0;
    for (const check of checks) {
      const fits = outcome === "all" || outcome.split(" ").includes(check.dataset.outcome);
      check.hidden = !(fits && (!text || wordsOf(check).includes(text)));
      shown += !check.hidden;
    }
    for (const group of groups) group.hidden = !group.querySelector(".check:not([hidden])");
    form.querySelector("output").textContent = `${shown} of ${checks.length} checks`;
  };

  form.hidden = false;
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();

  // A link to a check opens it, and shows it whatever the filter says.
  const reveal = () => {
    const found = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!found) return;
    if (found.closest("[hidden]")) {
      form.reset();
      filter();
    }
    for (let at = found; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    found.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  reveal();

  // Rows beyond the first are data until their table is opened.
  let later;
  const complete = (table) => {
    const key = table.dataset.more;
    if (!key) return;
    delete table.dataset.more;
    later ??= JSON.parse(document.getElementById("rows").textContent);
    const columns = later[key];
    const rows = document.createDocumentFragment();
    for (let at = 0; at < columns[0][0].length; at++) {
      const row = document.createElement("tr");
      for (const [values, texts] of columns) {
        const cell = row.insertCell();
        const value = texts ? texts[values[at]] : values[at];
        if (typeof value === "number") cell.className = "n";
        cell.textContent = value ?? "-";
      }
      rows.append(row);
    }
    table.tBodies[0].append(rows);
  };

  // Click a column's header to sort by it; numbers as numbers, what has no value last.
  const sortable = (table) => {
    const body = table.tBodies[0];
    for (const header of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const down = header.getAttribute("aria-sort") === "descending";
        for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
        header.setAttribute("aria-sort", down ? "ascending" : "descending");
        const direction = down ? 1 : -1;
        const keyed = [...body.rows].map((row) => {
          const text = row.cells[header.cellIndex]?.textContent.trim() ?? "";
          return { row, text, number: text === "" ? NaN : Number(text) };
        });
        keyed.sort((a, b) => {
          const [none, other] = [a.text === "-" || a.text === "", b.text === "-" || b.text === ""];
          if (none || other) return none - other;
          if (!isNaN(a.number) && !isNaN(b.number)) return direction * (a.number - b.number);
          return direction * a.text.localeCompare(b.text, "en", { numeric: true });
        });
        body.append(...keyed.map(({ row }) => row));
      });
    }
  };

  // Above a table too long to overlook: show the rows that contain every word of a text.
  const filterable = (table, title) => {
    const rows = [...table.tBodies[0].rows];
    if (rows.length < 12) return;
    const label = document.createElement("label");
    const field = document.createElement("input");
    const count = document.createElement("output");
    label.className = "rows";
    field.type = "search";
    field.autocomplete = "off";
    field.placeholder = "words";
    count.setAttribute("aria-live", "polite");
    label.append("Rows containing ", field, " ", count);
    field.setAttribute("aria-label", `Rows of ${title} containing`);
    field.addEventListener("input", () => {
      const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const row of rows) {
        const text = [...row.cells].map((cell) => cell.textContent).join(" ").toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = `${shown} of ${rows.length}`;
    });
    table.closest(".scroll").before(label);
  };

  // A table is made ready when it is first opened: a page has hundreds.
  for (const details of document.querySelectorAll("details.data")) {
    const ready = () => {
      for (const table of details.querySelectorAll("table.sortable:not([data-ready])")) {
        table.dataset.ready = "";
        complete(table);
        sortable(table);
        filterable(table, table.closest(".scroll").getAttribute("aria-label"));
      }
    };
    if (details.open) ready();
    details.addEventListener("toggle", () => details.open && ready());
  }

  // On paper, every check is open; tables of data stay as they are.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll(".check:not([open]), .own:not([open]), .reason:not([open]), .charts:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
}
