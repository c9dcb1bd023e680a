"use strict";
// A viewer of graphs whose rows were computed before: it only adds sizes, and draws what is in sight.
// data: {title, nodes, edges, groups, rows, dims} as graphopt.report.graph_page writes them.
function graphViewer(host, data, shared) {
  const count = data.nodes.length, pad = 12, gapX = 18, gapY = 30, head = 24, widest = 260;
  const el = (tag, text, parent, className) => {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    if (className) made.className = className;
    if (parent) parent.appendChild(made);
    return made;
  };
  const bar = el("div", "", host, "graph-bar");
  const search = el("input", "", bar);
  search.type = "search"; search.placeholder = "search ops, modules, weights";
  search.setAttribute("aria-label", "search the graph");
  const found = el("span", "", bar, "quiet");
  const select = el("select", "", bar);
  select.setAttribute("aria-label", "colour by");
  for (const [value, text] of [["bits", "colour: bits"], ["db", "colour: dB"], ["none", "no colour"]]) {
    el("option", text, select).value = value;
  }
  const button = (text, title, act) => {
    const made = el("button", text, bar); made.type = "button"; made.title = title; made.onclick = act;
  };
  button("fold", "fold all modules", () => foldAll(true));
  button("unfold", "unfold all modules", () => foldAll(false));
  button("fit", "show everything", () => fit());
  const stage = el("div", "", host, "graph-stage");
  const canvas = el("canvas", "", stage);
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `graph of ${data.title}, ${count} boxes`);
  const tip = el("div", "", stage, "graph-tip");
  const legend = el("div", "", host, "quiet graph-legend");
  const about = el("div", "", host, "graph-about");
  const context = canvas.getContext("2d");

  // --- what modules hold --------------------------------------------------------------------------
  const inside = data.groups.map(() => ({ops: 0, bits: 0, elements: 0, worst: null}));
  data.nodes.forEach((node) => {
    for (let g = node.group; g >= 0; g = data.groups[g][2]) {
      const sum = inside[g];
      if (node.kind !== "data") sum.ops += 1;
      for (const w of node.weights) {
        sum.bits += w.bits * w.elements; sum.elements += w.elements;
        if (w.snr_db !== null) sum.worst = sum.worst === null ? w.snr_db : Math.min(sum.worst, w.snr_db);
      }
    }
  });
  const kib = (bits) => bits >= 8 * 1048576 ? `${(bits / 8388608).toFixed(1)} MiB` : `${(bits / 8192).toFixed(1)} KiB`;
  const main = (node) => node.weights.reduce((best, w) => !best || w.elements > best.elements ? w : best, null);
  const facts = (entry) => {
    if (entry < count) {
      const w = main(data.nodes[entry]);
      return w && {bits: w.bits, db: w.snr_db};
    }
    const sum = inside[entry - count];
    return sum.elements ? {bits: sum.bits / sum.elements, db: sum.worst} : null;
  };
  const short = (group) => {
    const [name, , parent] = data.groups[group];
    const before = parent > 0 ? data.groups[parent][0] + "." : "";
    return name.startsWith(before) ? name.slice(before.length) : name;
  };
  function lines(entry) {
    const known = facts(entry);
    const figures = known ? `${known.bits.toFixed(known.bits < 10 ? 2 : 0)} bits` + (known.db === null ? "" : ` · ${known.db.toFixed(1)} dB`) : "";
    if (entry < count) {
      const node = data.nodes[entry];
      return [node.label, node.shape, figures].filter(Boolean);
    }
    const g = entry - count, sum = inside[g];
    return [`▸ ${short(g) || data.groups[g][1]}`, `${data.groups[g][1]} · ${sum.ops} ops`,
      sum.elements ? `${kib(sum.bits)} · ${figures}` : ""].filter(Boolean);
  }

  // --- places -------------------------------------------------------------------------------------
  const open = data.groups.map((_, g) => g === 0);
  const boxes = new Map();   // entry or line → {x, y, w, h} in the module that holds it, then absolute
  let order = [], drawn = [], scale = 1, shiftX = 0, shiftY = 0, chosen = null, hits = new Set(), touched = false;
  const font = (size, bold) => `${bold ? "600 " : ""}${size}px system-ui, sans-serif`;
  const textWidth = (text, bold) => { context.font = font(12, bold); return context.measureText(text).width; };
  const sizes = new Map();
  function size(entry) {
    if (!sizes.has(entry)) {
      const shown = lines(entry);
      const w = Math.max(...shown.map((text, i) => textWidth(text, i === 0)));
      sizes.set(entry, {w: Math.min(widest, Math.ceil(w) + 18), h: 8 + 16 * shown.length});
    }
    return sizes.get(entry);
  }
  const source = (entry) => entry < 0 ? -1 - entry : entry;
  const lanes = new Map();   // "module:entry" → boxes of the line from that entry to later rows
  const laneOf = (group, entry) => lanes.get(`${group}:${source(entry)}`) || [];
  // places nearest to the wanted ones that keep their order and distance (isotonic regression)
  function spread(wanted, widths) {
    let offset = 0;
    const blocks = [], offsets = widths.map((w, i) => { if (i) offset += (widths[i - 1] + w) / 2 + gapX; return offset; });
    wanted.forEach((x, i) => {
      blocks.push([x - offsets[i], 1]);
      while (blocks.length > 1 && blocks[blocks.length - 2][0] > blocks[blocks.length - 1][0]) {
        const [b, m] = blocks.pop(), [a, n] = blocks.pop();
        blocks.push([(a * n + b * m) / (n + m), n + m]);
      }
    });
    const means = blocks.flatMap(([mean, n]) => Array(n).fill(mean));
    return means.map((mean, i) => mean + offsets[i]);
  }
  const beside = data.groups.map(() => new Map());  // module → entry → what it is joined with inside
  const ways = data.nodes.map((node, place) => {
    const way = [place];
    for (let g = node.group; g > 0; g = data.groups[g][2]) way.push(count + g);
    return way.reverse();
  });
  const meet = (a, b) => {
    let depth = 0;
    while (ways[a][depth] === ways[b][depth]) depth += 1;
    return [depth === 0 ? 0 : ways[a][depth - 1] - count, ways[a][depth], ways[b][depth]];
  };
  const crossings = data.edges.map(([a, b]) => {
    const [group, one, other] = meet(a, b), near = beside[group];
    for (const [x, y] of [[one, other], [other, one]]) near.set(x, (near.get(x) || new Set()).add(y));
    return [group, one, other];
  });
  function place(group) {
    const rows = data.rows[group] || [], around = beside[group];
    const own = (entry) => entry < 0 ? {w: 8, h: 0} : entry >= count && open[entry - count] ? place(entry - count) : size(entry);
    const measured = rows.map((row) => row.map(own));
    const center = rows.map((row, r) => spread(row.map(() => 0), measured[r].map((m) => m.w)).map((x, i, all) => x - (all[0] + all[all.length - 1]) / 2));
    for (let sweep = 0; sweep < (rows.length > 400 ? 2 : 6); sweep += 1) {
      const down = sweep % 2 === 0;
      for (let i = 1; i < rows.length; i += 1) {
        const r = down ? i : rows.length - 1 - i, other = down ? r - 1 : r + 1;
        const at = new Map();
        rows[other].forEach((entry, j) => at.set(entry, center[other][j]));
        const wanted = rows[r].map((entry, j) => {
          const from = source(entry), spots = [];
          if (at.has(-1 - from) && entry < 0) spots.push(at.get(-1 - from));
          else if (entry < 0 && at.has(from)) spots.push(at.get(from));
          else for (const near of around.get(from) || []) {
            if (at.has(near)) spots.push(at.get(near)); else if (at.has(-1 - near)) spots.push(at.get(-1 - near));
          }
          return spots.length ? spots.reduce((a, b) => a + b, 0) / spots.length : center[r][j];
        });
        center[r] = spread(wanted, measured[r].map((m) => m.w));
      }
    }
    let left = Infinity, right = -Infinity, y = head;
    rows.forEach((row, r) => row.forEach((_, i) => {
      left = Math.min(left, center[r][i] - measured[r][i].w / 2);
      right = Math.max(right, center[r][i] + measured[r][i].w / 2);
    }));
    if (left > right) { left = 0; right = 60; }
    const title = group ? Math.min(widest, textWidth(`▾ ${short(group)} ${data.groups[group][1]}`, true) + 24) : 0;
    const spare = Math.max(0, title - (right - left)) / 2;
    rows.forEach((row, r) => {
      const tall = Math.max(0, ...measured[r].map((m) => m.h));
      row.forEach((entry, i) => {
        const {w, h} = measured[r][i];
        const box = {entry, group, x: center[r][i] - w / 2 - left + pad + spare, y: y + (tall - h) / 2, w, h, row: y, tall};
        if (entry >= 0) boxes.set(entry, box);
        else lanes.set(`${group}:${source(entry)}`, [...laneOf(group, entry), box]);
      });
      y += tall + gapY;
    });
    return {w: right - left + 2 * (pad + spare), h: y - gapY + pad};
  }
  function layout() {
    boxes.clear(); lanes.clear();
    const whole = place(0);
    boxes.set(count, {entry: count, group: -1, x: 0, y: 0, w: whole.w, h: whole.h});
    order = [];
    const absolute = (group, x, y) => {
      const passing = new Set();
      const move = (box) => { box.x += x; box.y += y; box.row += y; };
      for (const row of data.rows[group] || []) for (const entry of row) {
        if (entry < 0) { passing.add(entry); continue; }
        const box = boxes.get(entry);
        move(box);
        order.push(box);
        if (entry >= count && open[entry - count]) absolute(entry - count, box.x, box.y);
      }
      for (const entry of passing) laneOf(group, entry).forEach(move);
    };
    absolute(0, 0, 0);
    const seen = new Set();
    drawn = [];
    const visible = (node) => ways[node].find((entry) => entry < count || !open[entry - count]);
    data.edges.forEach(([a, b], i) => {
      const from = visible(a), to = visible(b), name = from * 1e7 + to;
      if (from === to || seen.has(name)) return;
      seen.add(name);
      const [group, one, other] = crossings[i], start = boxes.get(from), end = boxes.get(to);
      const points = [[start.x + start.w / 2, start.y + start.h]];
      const top = boxes.get(one), last = boxes.get(other);
      for (const line of laneOf(group, one)) {
        if (line.row > top.row && line.row < last.row) {
          points.push([line.x + line.w / 2, line.row], [line.x + line.w / 2, line.row + line.tall]);
        }
      }
      points.push([end.x + end.w / 2, end.y]);
      const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
      drawn.push({from, to, points, x: Math.min(...xs), y: Math.min(...ys), w: Math.max(...xs) - Math.min(...xs), h: Math.max(...ys) - Math.min(...ys)});
    });
  }

  // --- drawing ------------------------------------------------------------------------------------
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  let palette = {};
  const scaleOf = (known) => {
    if (!known || select.value === "none") return null;
    if (select.value === "bits") return known.bits <= 2.5 ? 0 : known.bits <= 3.5 ? 1 : known.bits <= 5 ? 2 : known.bits <= 9 ? 3 : 4;
    return known.db === null ? 4 : known.db < 15 ? 0 : known.db < 20 ? 1 : known.db < 30 ? 2 : 3;
  };
  function cut(text, width) {
    if (context.measureText(text).width <= width) return text;
    let low = 0, high = text.length;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (context.measureText(text.slice(0, middle) + "…").width <= width) low = middle; else high = middle - 1;
    }
    return text.slice(0, low) + "…";
  }
  let waiting = false;
  function draw() {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; paint(); });
  }
  function paint() {
    const ratio = window.devicePixelRatio || 1, wide = stage.clientWidth, high = stage.clientHeight;
    if (!wide) return;
    if (canvas.width !== Math.round(wide * ratio) || canvas.height !== Math.round(high * ratio)) {
      canvas.width = Math.round(wide * ratio); canvas.height = Math.round(high * ratio);
    }
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, wide, high);
    context.setTransform(ratio * scale, 0, 0, ratio * scale, ratio * shiftX, ratio * shiftY);
    const inSight = (b) => b.x + b.w >= -shiftX / scale && b.y + b.h >= -shiftY / scale
      && b.x <= (wide - shiftX) / scale && b.y <= (high - shiftY) / scale;
    const frame = (box, fill, stroke, width) => {
      context.beginPath(); context.roundRect(box.x, box.y, box.w, box.h, 5);
      context.fillStyle = fill; context.fill();
      context.lineWidth = width; context.strokeStyle = stroke; context.stroke();
    };
    const isOpen = (entry) => entry >= count && open[entry - count];
    for (const box of order) if (isOpen(box.entry) && inSight(box)) {
      frame(box, palette["--group"], box.entry === chosen ? palette["--accent"] : palette["--line"], box.entry === chosen ? 2 : 1);
      if (scale > 0.25) {
        context.font = font(12, true); context.fillStyle = palette["--ink"]; context.textBaseline = "middle";
        const name = cut(`▾ ${short(box.entry - count)}`, box.w - 16);
        context.fillText(name, box.x + 8, box.y + head / 2);
        const used = context.measureText(name + "  ").width;
        context.font = font(12); context.fillStyle = palette["--quiet"];
        context.fillText(cut(data.groups[box.entry - count][1], box.w - 16 - used), box.x + 8 + used, box.y + head / 2);
      }
    }
    const lineWidth = Math.max(1, 0.6 / scale);
    for (const edge of drawn) {
      if (!inSight(edge)) continue;
      const near = edge.from === chosen || edge.to === chosen;
      context.strokeStyle = near ? palette["--accent"] : palette["--edge"];
      context.lineWidth = near ? 2 * lineWidth : lineWidth;
      context.beginPath();
      const p = edge.points;
      context.moveTo(...p[0]);
      for (let i = 1; i < p.length; i += 1) {
        const [x0, y0] = p[i - 1], [x1, y1] = p[i], middle = (y0 + y1) / 2;
        if (Math.abs(x0 - x1) < 1) context.lineTo(x1, y1); else context.bezierCurveTo(x0, middle, x1, middle, x1, y1);
      }
      context.stroke();
      if (scale > 0.3) {
        const [x, y] = p[p.length - 1];
        context.beginPath(); context.moveTo(x, y); context.lineTo(x - 4, y - 7); context.lineTo(x + 4, y - 7);
        context.fillStyle = context.strokeStyle; context.fill();
      }
    }
    for (const box of order) {
      if (isOpen(box.entry) || !inSight(box)) continue;
      const known = facts(box.entry), step = scaleOf(known);
      const kind = box.entry < count ? data.nodes[box.entry].kind : "module";
      const plain = kind === "data" ? palette["--data"] : kind === "rounding" ? palette["--rounding"] : palette["--card"];
      const marked = box.entry === chosen || hits.has(box.entry);
      frame(box, step === null ? plain : palette[`--step${step}`], marked ? palette["--accent"] : palette["--line"], marked ? 2.5 : 1);
      if (scale <= 0.25) continue;
      context.textBaseline = "middle";
      lines(box.entry).forEach((text, i) => {
        context.font = font(12, i === 0);
        context.fillStyle = step !== null ? palette["--on-step"] : i === 0 ? palette["--ink"] : palette["--quiet"];
        context.fillText(cut(text, box.w - 16), box.x + 8, box.y + 12 + 16 * i);
      });
    }
  }
  function restyle() {
    for (const name of ["--ink", "--quiet", "--line", "--edge", "--card", "--group", "--data", "--rounding", "--accent",
      "--on-step", "--step0", "--step1", "--step2", "--step3", "--step4"]) palette[name] = colour(name);
    legend.textContent = "";
    const names = {bits: ["≤ 2 bits", "3", "4", "8", "more"], db: ["< 15 dB", "15–20", "20–30", "≥ 30", "exact"], none: []}[select.value];
    names.forEach((text, i) => { const item = el("span", text, legend); item.prepend(el("i")); item.firstChild.style.background = palette[`--step${i}`]; });
    if (data.dims.length) el("span", data.dims.join("; "), legend);
    draw();
  }

  // --- moving, folding, finding -------------------------------------------------------------------
  function fit(entry) {
    const box = boxes.get(entry === undefined ? count : entry), wide = stage.clientWidth, high = stage.clientHeight;
    if (!box || !wide) return;
    scale = entry === undefined ? Math.min(1, wide / (box.w + 20), high / (box.h + 20)) : Math.max(scale, 0.8);
    // a long graph is begun at its top, in a size that can be read
    if (entry === undefined && scale < 0.5) scale = Math.max(0.5, Math.min(1, wide / (box.w + 20)));
    shiftX = wide / 2 - scale * (box.x + box.w / 2);
    shiftY = entry === undefined ? Math.max(10, high / 2 - scale * (box.y + box.h / 2)) : high / 2 - scale * (box.y + box.h / 2);
    if (entry === undefined && scale * box.h > high) shiftY = 10;
    draw();
  }
  function wholeGraph() {
    const box = boxes.get(count);
    scale = Math.min(1, stage.clientWidth / (box.w + 20), stage.clientHeight / (box.h + 20));
    shiftX = stage.clientWidth / 2 - scale * box.w / 2; shiftY = stage.clientHeight / 2 - scale * box.h / 2;
    draw();
  }
  function toggle(group, wanted) {
    const box = boxes.get(count + group), before = box && [box.x + box.w / 2, box.y];
    open[group] = wanted === undefined ? !open[group] : wanted;
    layout();
    const after = boxes.get(count + group);
    if (before && after) { shiftX += scale * (before[0] - after.x - after.w / 2); shiftY += scale * (before[1] - after.y); }
    draw();
  }
  function foldAll(folded) {
    open.forEach((_, g) => { open[g] = g === 0 || !folded; });
    layout(); fit();
    if (shared) shared.folded(viewer, null, folded);
  }
  function reveal(place) {
    for (const entry of ways[place]) if (entry >= count) open[entry - count] = true;
    layout();
  }
  function choose(entry, quietly) {
    chosen = entry;
    about.textContent = "";
    if (entry !== null) {
      const rows = describe(entry);
      el("strong", rows[0], about);
      for (const text of rows.slice(1)) el("div", text, about);
    }
    draw();
    if (shared && !quietly) shared.chosen(viewer, entry);
  }
  function describe(entry) {
    if (entry >= count) {
      const g = entry - count, [name, type] = data.groups[g], sum = inside[g];
      const worst = sum.worst === null ? "" : `, worst weight ${sum.worst.toFixed(1)} dB`;
      return [`${name || "(root)"} (${type})`, `${sum.ops} ops; ${sum.elements.toLocaleString("en")} elements in ${kib(sum.bits)}${worst}`];
    }
    const node = data.nodes[entry];
    const weights = node.weights.map((w) => `${w.name}: ${w.shape || "scalar"}, ${w.stored}, ${w.bits.toFixed(2)} bits`
      + (w.snr_db === null ? "" : `, ${w.snr_db.toFixed(1)} dB`));
    return [`${node.id}: ${node.label}`, node.shape, data.groups[node.group][0], ...weights, ...node.facts].filter(Boolean);
  }
  function at(event) {
    const area = canvas.getBoundingClientRect();
    const x = (event.clientX - area.left - shiftX) / scale, y = (event.clientY - area.top - shiftY) / scale;
    let hit = null;
    for (const box of order) if (x >= box.x && x <= box.x + box.w && y >= box.y && y <= box.y + box.h) hit = box;
    return hit;
  }
  function zoom(factor, x, y) {
    const next = Math.min(3, Math.max(0.02, scale * factor));
    shiftX = x - (x - shiftX) * next / scale; shiftY = y - (y - shiftY) * next / scale;
    scale = next; draw();
  }
  canvas.addEventListener("wheel", (event) => {
    // plain scrolling is the page's until the graph has been touched
    if (!touched && !event.ctrlKey) return;
    event.preventDefault();
    const area = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY * 0.0015), event.clientX - area.left, event.clientY - area.top);
  }, {passive: false});
  canvas.addEventListener("mouseleave", () => { touched = false; tip.style.display = "none"; });
  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    touched = true; moved = 0; pointers.set(event.pointerId, [event.clientX, event.clientY]);
    try { canvas.setPointerCapture(event.pointerId); } catch { /* a pointer that is gone already */ }
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) return hover(event);
    const now = [event.clientX, event.clientY];
    if (pointers.size === 2) {
      const other = [...pointers].find(([id]) => id !== event.pointerId)[1], area = canvas.getBoundingClientRect();
      const far = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
      zoom(far(now) / far(before), other[0] - area.left, other[1] - area.top);
    } else { shiftX += now[0] - before[0]; shiftY += now[1] - before[1]; draw(); }
    moved += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]);
    pointers.set(event.pointerId, now);
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => {
    pointers.delete(event.pointerId);
    if (name === "pointercancel" || moved > 5) return;
    const hit = at(event);
    choose(hit ? hit.entry : null);
    if (hit && hit.entry >= count) {
      toggle(hit.entry - count);
      if (shared) shared.folded(viewer, hit.entry - count, !open[hit.entry - count]);
    }
  });
  function hover(event) {
    const hit = at(event);
    tip.style.display = hit ? "block" : "none";
    if (!hit) return;
    tip.textContent = describe(hit.entry).join("\n");
    const area = stage.getBoundingClientRect(), x = event.clientX - area.left, y = event.clientY - area.top;
    tip.style.left = `${Math.max(4, Math.min(x + 14, area.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > area.height ? Math.max(4, y - tip.offsetHeight - 10) : y + 18}px`;
  }
  canvas.addEventListener("keydown", (event) => {
    const step = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]}[event.key];
    if (step) { shiftX += step[0]; shiftY += step[1]; event.preventDefault(); draw(); }
    if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 1.2 : 1 / 1.2, stage.clientWidth / 2, stage.clientHeight / 2);
  });
  let turn = -1;
  function look(next) {
    const wanted = search.value.trim().toLowerCase();
    hits = new Set();
    if (wanted) data.nodes.forEach((node, place) => {
      const text = [node.id, node.label, data.groups[node.group][0], ...node.weights.map((w) => w.name)].join(" ").toLowerCase();
      if (text.includes(wanted)) hits.add(place);
    });
    const all = [...hits];
    turn = next && all.length ? (turn + 1) % all.length : 0;
    found.textContent = wanted ? (all.length ? `${turn + 1} of ${all.length}` : "nothing") : "";
    if (all.length) { reveal(all[turn]); choose(all[turn]); fit(all[turn]); } else draw();
  }
  search.addEventListener("input", () => look(false));
  search.addEventListener("keydown", (event) => { if (event.key === "Enter") look(true); });
  select.addEventListener("change", restyle);

  // --- the beginning: unfold from outside in while the boxes are few ----------------------------------
  const held = (group) => (data.rows[group] || []).flat().filter((entry) => entry >= 0);
  let shown = held(0).length;
  const line = held(0).filter((entry) => entry >= count);
  while (line.length) {
    const group = line.shift() - count, own = held(group);
    if (own.length > 1 && shown + own.length > 60) continue;
    open[group] = true; shown += own.length - 1;
    line.push(...own.filter((entry) => entry >= count));
  }
  const viewer = {
    data, ways, count, toggle, choose, reveal, fit, foldAll: (folded) => { open.forEach((_, g) => { open[g] = g === 0 || !folded; }); layout(); draw(); },
    state: () => ({open: open.filter(Boolean).length, boxes: order.length, lines: drawn.length, scale, chosen, hits: hits.size,
      bounds: [boxes.get(count).w, boxes.get(count).h], cut: order.filter((b) => b.entry < count && b.w >= widest).length}),
    paint, wholeGraph, at: (entry) => boxes.get(entry),
  };
  layout();
  restyle();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", restyle);
  let known = 0;
  new ResizeObserver(() => { if (!known && stage.clientWidth) { known = 1; fit(); } draw(); }).observe(stage);
  return viewer;
}

// Two graphs side by side: what is folded or chosen in one is in the other, by the modules' names.
function graphPair(hosts, pair) {
  const viewers = [];
  const names = pair.map((data) => new Map(data.groups.map(([name], g) => [name, g])));
  const ids = pair.map((data) => new Map(data.nodes.map((node, place) => [node.id, place])));
  const other = (viewer) => 1 - viewers.indexOf(viewer);
  const shared = {
    folded(viewer, group, folded) {
      const to = other(viewer);
      if (group === null) viewers[to].foldAll(folded);
      else {
        const partner = names[to].get(viewer.data.groups[group][0]);
        if (partner !== undefined) viewers[to].toggle(partner, !folded);
      }
    },
    chosen(viewer, entry) {
      const to = other(viewer), count = viewer.count;
      let partner;
      if (entry !== null && entry >= count) {
        const group = names[to].get(viewer.data.groups[entry - count][0]);
        partner = group === undefined ? undefined : group + viewers[to].count;
      } else if (entry !== null) partner = ids[to].get(viewer.data.nodes[entry].id);
      viewers[to].choose(partner === undefined ? null : partner, true);
      if (partner !== undefined && partner < viewers[to].count) { viewers[to].reveal(partner); viewers[to].fit(partner); }
    },
  };
  pair.forEach((data, i) => viewers.push(graphViewer(hosts[i], data, shared)));
  return viewers;
}
