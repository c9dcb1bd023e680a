"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const make = (tag, text, into, className) => {
  const made = document.createElement(tag);
  if (text !== undefined && text !== "") made.textContent = text;
  if (className) made.className = className;
  if (into) into.appendChild(made);
  return made;
};
const section = (title, remark) => {
  const made = make("section", "", page);
  make("h2", title, made);
  if (remark) make("p", remark, made, "quiet");
  return made;
};
const finite = (value) => typeof value === "number" ? value : null;
const db = (value) => value === null || value === undefined ? "" : value === "inf" ? "exact" : typeof value === "number" ? value.toFixed(1) : String(value);
const size = (bytes) => (bytes / 1024).toFixed(bytes < 10240 ? 2 : 1);
const short = (name) => name.startsWith(data.prefix) ? name.slice(data.prefix.length) : name;
// what tells layers apart stands at the end of their names
const trimmed = (name) => {
  const most = innerWidth < 600 ? 20 : 36, own = name.replace(/\.weight$/, "");
  return own.length <= most ? own : "…" + own.slice(own.length - most + 1);
};

// --- charts, in the colours of the page ---------------------------------------------------------------
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const drawings = [];
const settings = {displayModeBar: false};
const resized = new ResizeObserver((entries) => entries.forEach(({target}) => {
  const wide = target.clientWidth;
  if (wide && target._fullLayout && Math.abs(wide - target._fullLayout.width) > 1) Plotly.relayout(target, {width: wide});
}));
function chart(into, title, height, build) {
  const box = make("div", "", into, "chart");
  if (title) make("h3", title, box);
  const plot = make("div", "", box);
  const drawing = {plot, draw() {
    const {traces, layout} = build(), ink = colour("--ink"), line = colour("--line");
    const axis = {automargin: true, gridcolor: line, zerolinecolor: line, linecolor: line, tickfont: {size: 11}};
    const base = {height, width: plot.clientWidth || undefined, margin: {l: 8, r: 16, t: 30, b: 40}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {color: ink, family: "system-ui, sans-serif", size: 12}, hovermode: "closest", legend: {orientation: "h", x: 0, y: 1, yanchor: "bottom"},
      hoverlabel: {bgcolor: colour("--card"), bordercolor: line, font: {color: ink}, align: "left", namelength: -1}};
    Plotly.react(plot, traces, {...base, ...layout, xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis}}, settings);
  }};
  drawings.push(drawing);
  drawing.draw();
  resized.observe(plot);
  return drawing;
}
const layerAxis = (names) => ({type: "category", categoryorder: "array", categoryarray: names, autorange: "reversed",
  tickmode: "array", tickvals: names, ticktext: names.map((name) => trimmed(short(name))), ticks: ""});
const tall = (count) => Math.max(180, 17 * count + 90);

// --- the whole ----------------------------------------------------------------------------------------
const tiles = make("div", "", page, "tiles");
for (const [what, value, remark] of data.tiles) {
  const tile = make("div", "", tiles, "tile");
  make("span", what, tile); make("b", value, tile);
  make("span", remark && short(remark), tile);
}
for (const note of data.notes) make("p", note, page, "quiet");
make("p", data.about, page, "quiet");

// --- weights --------------------------------------------------------------------------------------------
const rows = data.weights.map((row) => ({...row, loss: row.own_db ?? row.weight_db}));
const known = (key) => rows.some((row) => row[key] !== null && row[key] !== undefined);
if (rows.length) {
  const made = section("Weights", "Worst first, by the error of the op's output where it is known, else of the weight. A row shows its values below. In charts: drag to zoom, double-click to go back."
    + (data.prefix ? ` Names are without “${data.prefix}”.` : ""));
  let detail;
  const columns = [
    {name: "weight", key: "name", left: true, text: short}, {name: "op", key: "op", left: true}, {name: "shape", key: "shape"},
    {name: "bits", key: "bits", text: (v) => v.toFixed(3), title: "stored bits per element, tables and scales included"},
    {name: "tables", key: "tables", text: (v) => v ?? ""},
    {name: "KiB before", key: "before", text: size}, {name: "KiB after", key: "after", text: size},
    {name: "weight dB", key: "weight_db", text: db, title: "signal to error of the weight"},
    {name: "own dB", key: "own_db", text: db, title: "signal to error of the output, this weight alone"},
    {name: "output dB", key: "output_db", text: db, title: "signal to error of the output, with the layers before"},
    {name: "status", key: "status", left: true}, {name: "what, or why not", key: "why", left: true, wrap: true},
  ].filter((column) => !["own_db", "output_db", "tables"].includes(column.key) || known(column.key));
  const pick = (row) => {
    detail.textContent = "";
    while (drawings.length > fixed) drawings.pop();
    const palette = data.palettes[row.name];
    if (!palette) { make("p", `${row.name} is stored as it was, so that it has no palette.`, detail, "quiet"); return; }
    histogram(detail, row.name, palette);
  };
  let fixed = 0;
  window.weightTable = dataTable(made, columns, rows, {filter: "filter weights, ops, status", what: "weights", sort: known("loss") ? "loss" : null, pick});
  detail = make("div", "", made);
  const order = data.weights, names = order.map((row) => row.name);
  const charts = make("div", "", made, "charts");
  const dots = [["weight_db", "weight", "--table"], ["own_db", "output, this layer alone", "--own"], ["output_db", "output, with the layers before", "--after"]]
    .filter(([key]) => order.some((row) => finite(row[key]) !== null));
  const lossy = order.filter((row) => dots.some(([key]) => finite(row[key]) !== null));
  if (dots.length) chart(charts, "Errors in the order of the network", tall(lossy.length), () => ({
    traces: dots.map(([key, name, shade]) => ({type: "scatter", mode: "markers", name, y: lossy.map((row) => row.name), x: lossy.map((row) => finite(row[key])),
      text: lossy.map((row) => row.name), marker: {size: 8, color: colour(shade)}, hovertemplate: "%{text}<br>%{x:.1f} dB"})),
    layout: {xaxis: {title: {text: "signal to error, dB"}}, yaxis: layerAxis(lossy.map((row) => row.name))}}));
  chart(charts, "Sizes", tall(names.length), () => ({
    traces: [["before", "before", "--before"], ["after", "after", "--after"]].map(([key, name, shade]) => ({type: "bar", orientation: "h", name, y: names,
      x: order.map((row) => row[key] / 1024), text: names, textposition: "none", marker: {color: colour(shade)}, hovertemplate: "%{text}<br>%{x:,.1f} KiB"})),
    layout: {barmode: "group", bargap: 0.25, xaxis: {type: "log", title: {text: "KiB"}}, yaxis: layerAxis(names)}}));
  fixed = drawings.length;
  const first = Object.keys(data.palettes)[0];
  if (first) {
    const worst = [...rows].filter((row) => data.palettes[row.name]).sort((a, b) => (finite(a.loss) ?? 1e9) - (finite(b.loss) ?? 1e9))[0];
    if (worst) pick(worst);
  }
}
function histogram(into, name, palette) {
  const {low, high, counts, entries, label, exact} = palette, step = (high - low) / counts.length, most = Math.max(...counts);
  chart(into, "", 260, () => ({
    traces: [{type: "bar", name: exact ? "exact weight" : "stored weight", x: counts.map((_, i) => low + step * (i + 0.5)), y: counts, width: step,
      marker: {color: colour("--before")}, hovertemplate: "about %{x:.3g}: %{y:,}"},
    ...(entries.length ? [{type: "scatter", mode: "lines", name: `${entries.length} table entries`, x: entries.flatMap((v) => [v, v, null]),
      y: entries.flatMap(() => [0, most, null]), line: {color: colour("--table"), width: entries.length > 64 ? 0.5 : 1.2}, hovertemplate: "%{x:.4g}"}] : [])],
    layout: {bargap: 0, margin: {l: 8, r: 16, t: 54, b: 40}, title: {text: `${trimmed(short(name))}: ${label}`, font: {size: 13}, x: 0, xanchor: "left"},
      xaxis: {title: {text: "value"}}, yaxis: {title: {text: "elements"}}}}));
}

// --- activations ------------------------------------------------------------------------------------------
if (data.activations.length) {
  const made = section("Activations", "Where values are rounded, with which scale, and why.");
  const number = (v) => v === null || v === undefined ? "" : Number(v.toPrecision(4)).toString();
  dataTable(made, [
    {name: "values", key: "values", left: true, wrap: true}, {name: "type, or why not", key: "detail", left: true, wrap: true},
    {name: "low", key: "low", text: number}, {name: "high", key: "high", text: number}, {name: "scale", key: "scale", text: number},
    {name: "offset", key: "offset", text: number}, {name: "seen", key: "seen"}, {name: "why", key: "why", left: true, wrap: true},
    {name: "decided by", key: "path", left: true, wrap: true},
  ], data.activations.map((row) => ({...row, values: (row.nodes.length ? row.nodes : [row.name]).join(", ")})), {filter: "filter activations", what: "scales and ops in float"});
}

// --- curves of searches -------------------------------------------------------------------------------------
const wheel = ["--after", "--table", "--own", "--accent", "--quiet", "--step0", "--step2"];
for (const one of data.charts) {
  const made = section(one.section);
  if (one.kind === "dots") chart(made, one.title, tall(one.names.length), () => ({
    traces: one.series.map(([name, values], i) => ({type: "scatter", mode: "markers", name, y: one.names, x: values.map(finite), text: one.names,
      marker: {size: 8, color: colour(wheel[i % wheel.length]), symbol: i}, hovertemplate: "%{text}<br>%{x:.4g}"})),
    layout: {xaxis: {type: one.log ? "log" : "linear", title: {text: one.axis}}, yaxis: layerAxis(one.names)}}));
  else chart(made, one.title, 420, () => {
    const points = (mode, symbol) => ([name, list], i) => ({type: "scatter", mode, name, x: list.map((p) => p[0]), y: list.map((p) => p[1]), text: list.map((p) => p[2]),
      textposition: "bottom right", marker: {size: 9, symbol}, line: {dash: i ? "dot" : "solid"}, hovertemplate: "%{text}<br>%{x:.3f}, %{y:.4g}"});
    const level = one.level ? {shapes: [{type: "line", xref: "paper", x0: 0, x1: 1, y0: one.level[1], y1: one.level[1], line: {dash: "dash", color: colour("--quiet")}}],
      annotations: [{xref: "paper", x: 1, y: one.level[1], text: one.level[0], showarrow: false, yanchor: "bottom", xanchor: "right"}]} : {};
    return {traces: [...one.lines.map(points("lines+markers", "circle")), ...one.marks.map(points("markers+text", "square"))],
      layout: {...level, xaxis: {title: {text: one.x}}, yaxis: {title: {text: one.y}}}};
  });
}

// --- how it was made, and the graph ----------------------------------------------------------------------------
for (const [name, text] of data.texts) make("pre", text, section(name));
if (data.passes.length) {
  const timed = data.passes.some((row) => row[1] !== null), made = section("Passes", timed ? "" : "In order; their times are known where the program was made in this process.");
  dataTable(made, [
    {name: "", key: "place"}, {name: "pass", key: "pass", left: true},
    ...(timed ? [{name: "ms", key: "ms", text: (v) => v.toFixed(1)}, {name: "nodes before", key: "was"}, {name: "nodes after", key: "now"},
      {name: "changed", key: "changed", left: true}] : []),
  ], data.passes.map(([pass, ms, was, now, changed], i) => ({place: i + 1, pass, name: pass, ms, was, now, changed: changed ? "yes" : ""})),
  {filter: "filter passes", what: "passes"});
}
window.viewers = [graphViewer(section("Graph", "Click a module to fold it; drag to move, scroll after a click to zoom."), data.graph)];
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawings.forEach((drawing) => drawing.draw()));
let wide = innerWidth;
addEventListener("resize", () => { if ((wide < 600) !== (innerWidth < 600)) { wide = innerWidth; drawings.forEach((drawing) => drawing.draw()); } });
