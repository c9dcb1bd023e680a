"use strict";
// A table that sorts by its heads and filters by what is typed.
// columns: [{name, key, left, wrap, text}], rows: plain objects; pick(row) is called for a row that is clicked.
function dataTable(parent, columns, rows, options) {
  const el = (tag, text, into) => {
    const made = document.createElement(tag);
    if (text !== undefined && text !== "") made.textContent = text;
    if (into) into.appendChild(made);
    return made;
  };
  const tools = el("div", "", parent);
  tools.className = "tools";
  const filter = el("input", "", tools);
  filter.type = "search"; filter.placeholder = options.filter;
  filter.setAttribute("aria-label", options.filter);
  const count = el("span", "", tools);
  count.className = "quiet";
  const holder = el("div", "", parent);
  holder.className = "wide"; holder.tabIndex = 0;
  const table = el("table", "", holder), head = el("tr", "", el("thead", "", table)), body = el("tbody", "", table);
  let sorted = options.sort || null, up = true, picked = null;
  const shownAs = (column, row) => column.text ? column.text(row[column.key], row) : row[column.key] ?? "";
  const rank = (value) => value === null || value === undefined ? Infinity : value === "inf" ? 1e308 : value === "-inf" ? -1e308 : value;
  for (const column of columns) {
    const cell = el("th", "", head);
    if (column.left) cell.className = "l";
    const button = el("button", column.name, cell);
    button.type = "button"; button.title = column.title || `sort by ${column.name}`;
    button.onclick = () => { up = sorted === column.key ? !up : true; sorted = column.key; fill(); };
    column.cell = cell;
  }
  function fill() {
    const wanted = filter.value.trim().toLowerCase().split(/\s+/).filter(Boolean);
    let shown = rows.filter((row) => {
      const text = columns.map((column) => shownAs(column, row)).join(" ").toLowerCase() + " " + (row.name || "").toLowerCase();
      return wanted.every((word) => text.includes(word));
    });
    if (sorted) {
      const compare = (a, b) => {
        const x = rank(a[sorted]), y = rank(b[sorted]);
        if (x === Infinity || y === Infinity) return x === y ? 0 : x === Infinity ? 1 : -1;  // what is unknown comes last
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", {numeric: true});
        return up ? order : -order;
      };
      shown = [...shown].sort(compare);
    }
    for (const column of columns) {
      column.cell.setAttribute("aria-sort", column.key === sorted ? (up ? "ascending" : "descending") : "none");
      column.cell.firstChild.textContent = column.name + (column.key === sorted ? (up ? " ▲" : " ▼") : "");
    }
    count.textContent = shown.length === rows.length ? `${rows.length} ${options.what}` : `${shown.length} of ${rows.length} ${options.what}`;
    body.textContent = "";
    for (const row of shown) {
      const line = el("tr", "", body);
      for (const column of columns) {
        const cell = el("td", String(shownAs(column, row)), line);
        cell.className = [column.left ? "l" : "", column.wrap ? "t" : ""].join(" ").trim();
        if (column.title && column.full) cell.title = column.full(row);
      }
      if (row === picked) line.classList.add("on");
      if (options.pick) {
        line.classList.add("pick"); line.tabIndex = 0;
        const pick = () => { picked = row; body.querySelectorAll(".on").forEach((other) => other.classList.remove("on")); line.classList.add("on"); options.pick(row); };
        line.onclick = pick;
        line.onkeydown = (event) => { if (event.key === "Enter") pick(); };
      }
    }
  }
  filter.addEventListener("input", fill);
  fill();
  return {filter, fill, body};
}
