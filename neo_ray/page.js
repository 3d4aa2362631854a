"use strict";
// Draws the figures in the colours of the page (light, dark, paper) and sorts tables. No network, no library but plotly.
(() => {
  const read = (id) => document.getElementById(id).textContent;
  const figures = JSON.parse(read("figures"));
  const onDark = JSON.parse(read("on-dark"));
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const WIDTH_OF_PAPER = { one: 680, several: 330 };
  const BUTTONS = [["toImage", "zoom2d", "pan2d", "resetScale2d"]];
  const touch = !matchMedia("(hover: hover)").matches;
  let printing = false;

  const themed = (name) => {
    let text = JSON.stringify(figures[name]);
    const isDark = dark.matches && !printing;
    if (isDark) for (const [light, other] of Object.entries(onDark)) text = text.replaceAll(light, other);
    const figure = JSON.parse(text);
    const ink = isDark ? "#d5dade" : "#1c2126";
    const grid = isDark ? "#2c343b" : "#e6e9ec";
    figure.layout.font = { color: ink, size: 12, family: "system-ui, sans-serif" };
    for (const key of Object.keys(figure.layout)) {
      if (!/^[xy]axis/.test(key)) continue;
      Object.assign(figure.layout[key], { gridcolor: grid, linecolor: grid, tickcolor: grid });
    }
    figure.layout.hoverlabel = { bgcolor: isDark ? "#252c33" : "#ffffff", bordercolor: grid, font: { color: ink, size: 12 }, align: "left" };
    return figure;
  };

  const draw = (name) => {
    const place = document.getElementById(name);
    const { data, layout } = themed(name);
    if (printing) layout.width = WIDTH_OF_PAPER[place.closest(".several") ? "several" : "one"];
    else layout.autosize = true;
    layout.dragmode = touch ? false : "zoom"; // a finger scrolls the page
    const options = { responsive: !printing, displaylogo: false, modeBarButtons: BUTTONS };
    if (touch || printing) options.displayModeBar = false;
    return Plotly.react(place, data, layout, options);
  };

  const drawAll = () => Promise.all(Object.keys(figures).map(draw));
  const valueOf = (cell) => {
    const text = cell.textContent.trim();
    const found = /^(-?[\d.]+(?:e[-+]?\d+)?)([kM]?)$/.exec(text);
    if (!found) return text === "–" || text === "" ? null : text;
    return Number(found[1]) * { "": 1, k: 1e3, M: 1e6 }[found[2]];
  };
  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b);
    return typeof a === "number" ? -1 : 1;
  };

  const sortBy = (table, column, direction) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [valueOf(row.cells[column]), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null); // what is missing comes last either way
      return direction * compare(a, b);
    });
    body.append(...rows.map(([, row]) => row));
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      head.setAttribute("aria-sort", index === column ? (direction > 0 ? "ascending" : "descending") : "none");
    });
  };

  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      head.querySelector("button").addEventListener("click", () => {
        sortBy(table, column, head.getAttribute("aria-sort") === "ascending" ? -1 : 1);
      });
    });
  }

  dark.addEventListener("change", drawAll);
  addEventListener("beforeprint", () => { printing = true; drawAll(); });
  addEventListener("afterprint", () => { printing = false; drawAll(); });
  drawAll().then(() => document.documentElement.setAttribute("data-drawn", "all"));
})();
