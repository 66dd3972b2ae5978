"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = document.getElementById("svg-source").namespaceURI;
const tips = new WeakMap();

// --- building nodes; text only ever enters as text

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "tip") tips.set(node, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(key, value);
  }
  for (const child of [children].flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const main = document.getElementById("main");

// --- numbers

function size(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  for (const [unit, scale] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (Math.abs(bytes) >= scale) return (bytes / scale).toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "") + " " + unit;
  return bytes + " bytes";
}
function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const magnitude = Math.abs(value);
  return magnitude < 1e-3 || magnitude >= 1e5 ? value.toExponential(digits - 1).replace(/\.?0+e/, "e") : String(+value.toPrecision(digits));
}

// --- colours

const dark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
const HEAT = {
  light: ["#fcf4ea", "#f8cfa5", "#ee9564", "#c94a42", "#74122f"],
  dark: ["#292531", "#5b2a4a", "#a63b4c", "#e27a43", "#fcd590"],
};
const PART = { embedding: "#4878a8", head: "#7fb2d9", attention: "#e08a3c", mlp: "#5aa469", other: "#b89b6a", scales: "#a678b4", rest: "#8d939c" };
const PART_NAME = { scales: "scales, zero points, padding", rest: "norms, biases, graph", other: "other weights" };
function mix(a, b, t) {
  const parse = (c) => [1, 3, 5].map((i) => parseInt(c.slice(i, i + 2), 16));
  const [x, y] = [parse(a), parse(b)];
  return "#" + x.map((v, i) => Math.round(v + t * (y[i] - v)).toString(16).padStart(2, "0")).join("");
}
function ramp(stops, t) {
  const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
  return mix(stops[i], stops[i + 1], at - i);
}
function bitsColour(bits) {
  const stops = data.scale.stops;
  if (bits >= 12) return data.scale.float;
  if (bits <= stops[0][0]) return stops[0][1];
  for (let i = 1; i < stops.length; i++)
    if (bits <= stops[i][0]) return mix(stops[i - 1][1], stops[i][1], (bits - stops[i - 1][0]) / (stops[i][0] - stops[i - 1][0]));
  return stops[stops.length - 1][1];
}
const heatColour = (t) => ramp(HEAT[dark() ? "dark" : "light"], t);

// --- scales and axes

function logScale(values, from, to, pad = 0.06) {
  const positive = values.filter((v) => v > 0);
  const low = positive.length ? Math.min(...positive) : 1e-6, high = positive.length ? Math.max(...positive) : 1;
  let [a, b] = [Math.log10(low), Math.log10(high)];
  if (b - a < 1e-9) [a, b] = [a - 0.5, b + 0.5];
  [a, b] = [a - pad * (b - a), b + pad * (b - a)];
  const place = (v) => from + ((v > 0 ? Math.log10(v) : a) - a) / (b - a) * (to - from);
  const ticks = [];
  const steps = b - a > 1.6 ? [1] : b - a > 0.7 ? [1, 2, 5] : [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9];
  const every = Math.max(1, Math.ceil((b - a) / 7));
  for (let e = Math.floor(a); e <= Math.ceil(b); e++)
    for (const m of steps) if (Math.log10(m) + e >= a && Math.log10(m) + e <= b && (steps.length > 1 || e % every === 0)) ticks.push(m * 10 ** e);
  return { place, ticks };
}
function axes(x, y, box, xLabel, yLabel, xText = number, yText = number) {
  let last = -Infinity;
  const roomy = x.ticks.filter((v) => {
    const fits = x.place(v) - last >= 52;
    if (fits) last = x.place(v);
    return fits;
  });
  return [
    roomy.map((v) => s("g", {}, s("line", { class: "axis", x1: x.place(v), x2: x.place(v), y1: box.top, y2: box.bottom }),
      s("text", { x: x.place(v), y: box.bottom + 15, "text-anchor": "middle" }, xText(v)))),
    y.ticks.map((v) => s("g", {}, s("line", { class: "axis", x1: box.left, x2: box.right, y1: y.place(v), y2: y.place(v) }),
      s("text", { x: box.left - 6, y: y.place(v) + 4, "text-anchor": "end" }, yText(v)))),
    s("text", { x: (box.left + box.right) / 2, y: box.bottom + 33, "text-anchor": "middle" }, xLabel),
    s("text", { transform: `translate(13 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel),
  ];
}
const chart = (width, height, label, ...children) =>
  s("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": label }, children);

// --- the state: which point is shown

const points = [...data.pareto].sort((a, b) => a.bytes - b.bytes);
let shown = data.exported;
const listeners = [];
const onShow = (draw) => { listeners.push(draw); draw(); };
function show(point) { shown = point; for (const draw of listeners) draw(); }

// --- sections

function section(id, title, text, ...children) {
  const node = h("section", { id }, h("h2", {}, title), text ? h("p", { class: "soft small" }, text) : null, children);
  main.append(node);
  return node;
}

function header() {
  const toggle = h("button", {
    type: "button",
    onclick: () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; for (const draw of listeners) draw(); },
  }, "light / dark");
  main.append(h("header", {}, h("div", {}, h("h1", {}, data.name), h("p", { class: "soft" }, data.facts.join(" · "))), toggle));
  main.append(h("div", { class: "figures", id: "figures" }, data.figures.map((f) => h("div", { class: "figure" },
    h("span", { class: "soft small" }, f.what), h("b", {}, f.after),
    h("span", { class: "soft small" }, [f.before ? "from " + f.before : "", f.note].filter(Boolean).join(" · "))))));
}

function strip() {
  const n = data.blocks.length, cell = Math.max(8, Math.min(30, Math.floor(960 / Math.max(n, 1)))), tall = 26;
  const most = Math.max(1, ...data.blocks.map((b) => b.sublayers.length)), height = most * (tall + 2) - 2;
  const prefix = (id) => id.replace(/block\d+$/, "");
  const ends = (kind) => data.other.filter((o) => o.kind === kind);
  const svgBox = h("div", { class: "scroll" });
  const legend = h("div", { class: "legend" });
  const put = (x, y, w, hgt, bits, what, chosen) => {
    const change = chosen === "keep" ? "" : chosen;
    const gone = bits === null || bits === undefined;
    const text = what + (gone || !change ? "" : "\n" + change) + "\n" + (gone ? "dropped" : bits === 0 ? "stores no weights of its own" : bits >= 12 ? `${number(bits)} bits (floating point)` : `${number(bits)} bits per weight`);
    return [
      s("rect", { x: x + (gone ? 0.5 : 0), y: y + (gone ? 0.5 : 0), width: w - (gone ? 1 : 0), height: hgt - (gone ? 1 : 0), rx: 3, tip: text, class: gone ? "dropped" : "cell", fill: gone ? "transparent" : bits === 0 ? "var(--line)" : bitsColour(bits),
        stroke: gone ? "var(--soft)" : "none", "stroke-dasharray": gone ? "3 2" : null }),
      !gone && w >= 22 ? s("text", { x: x + w / 2, y: y + hgt / 2 + 4, "text-anchor": "middle", "pointer-events": "none",
        style: `fill:${bits === 0 ? "var(--ink)" : bits < 5.5 ? "#10241a" : "#fff"};font-size:10.5px` }, bits >= 12 ? "f" + Math.round(bits) : bits === 0 ? "=" : bits.toFixed(1)) : null,
      !gone && change ? s("circle", { class: "changed", cx: x + w - 4, cy: y + 4, r: 2, fill: bits === 0 ? "var(--ink)" : "#fff", "pointer-events": "none" }) : null,
    ];
  };
  section("plan", "The plan", "One column per block, its sublayers from top to bottom. Colour is the bits stored per weight, scales included; a dashed cell is dropped, a pale one reads another's weights, and a dot marks any other change of what is computed (hover for it).", svgBox, legend);
  onShow(() => {
    let x = 0;
    const nodes = [];
    const end = (part) => {
      const name = part.id.split(".").pop(), wide = Math.max(44, 7.4 * name.length);
      nodes.push(put(x, 0, wide - 4, height, shown.other[part.id], part.id), s("text", { x: x + (wide - 4) / 2, y: height + 16, "text-anchor": "middle" }, name));
      x += wide;
    };
    ends("embedding").forEach(end);
    x += 14;
    let before = null;
    data.blocks.forEach((block, i) => {
      if (before !== null && prefix(block.id) !== before) x += 18;
      const local = +block.id.match(/\d+$/)[0], each = height / block.sublayers.length;
      block.sublayers.forEach((sub, k) => nodes.push(put(x, k * each + (k ? 1 : 0), cell - 2, each - (k ? 1 : 1), shown.strip[i][k], sub.id, shown.plan[sub.id] || shown.plan[block.id])));
      if (local % (n > 12 ? 5 : 1) === 0) nodes.push(s("text", { x: x + cell / 2 - 1, y: height + 16, "text-anchor": "middle" }, local));
      if (prefix(block.id) !== before && prefix(block.id)) nodes.push(s("text", { x, y: height + 32 }, prefix(block.id).replace(/\.$/, "")));
      before = prefix(block.id);
      x += cell;
    });
    x += 14;
    ends("head").forEach(end);
    svgBox.replaceChildren(n ? chart(x + 4, height + 38, "bits of every block", nodes) : h("p", { class: "soft" }, "This model has no residual stream, so there are no blocks to draw."));
    const drawn = [...ends("embedding"), ...ends("head")].map((part) => shown.other[part.id]);
    const bits = [...new Set([...shown.strip.flat(), ...drawn].filter((b) => b).map((b) => Math.round(b)))].sort((a, b) => a - b);
    legend.replaceChildren(...bits.map((b) => h("span", {}, h("i", { style: `background:${bitsColour(b)}` }), b >= 12 ? `${b} (floating point)` : `${b} bits`)));
  });
}

function pareto() {
  const left = h("div"), right = h("div");
  const host = h("div", { class: "choose", id: "pareto" }, left, right);
  document.getElementById("plan").append(host);
  if (points.length) {
    const slider = h("input", { type: "range", id: "slider", min: 0, max: points.length - 1, step: 1, "aria-label": "size of the plan",
      value: nearest(), oninput: (event) => show(points[+event.target.value]) });
    const box = { left: 62, right: 560, top: 10, bottom: 250 }, holder = h("div");
    left.append(h("h3", {}, "Size against predicted damage"), holder, slider,
      h("div", { class: "row small soft" }, h("span", {}, "smaller"), h("span", { style: "margin-left:auto" }, "larger")));
    onShow(() => {
      slider.value = points.indexOf(shown) >= 0 ? points.indexOf(shown) : nearest();
      const all = [...points, data.exported], m = data.measured;
      const x = logScale(all.map((p) => p.bytes), box.left, box.right);
      const y = logScale([...all.map((p) => p.damage), m && m.value, m && m.low, m && m.high].filter(Boolean), box.bottom, box.top);
      const line = points.map((p, i) => (i ? "L" : "M") + x.place(p.bytes) + " " + y.place(p.damage)).join("");
      const bytes = data.exported.bytes;
      holder.replaceChildren(chart(580, 292, "Pareto curve",
        axes(x, y, box, "bytes stored", "damage, " + data.unit, size),
        s("path", { d: line, fill: "none", stroke: "var(--accent)", "stroke-width": 1.5, opacity: 0.6 }),
        points.map((p) => s("circle", { class: "point hit", cx: x.place(p.bytes), cy: y.place(p.damage), r: p === shown ? 7 : 4, fill: p === shown ? "var(--accent)" : "var(--card)",
          stroke: "var(--accent)", "stroke-width": 1.5, tip: `${size(p.bytes)}, ${p.avg_bits.toFixed(2)} bits\npredicted ${number(p.damage)}\n${p.dropped.length} sublayers dropped`, onclick: () => show(p) })),
        data.exported.damage !== null ? s("rect", { x: x.place(bytes) - 5, y: y.place(data.exported.damage) - 5, width: 10, height: 10, transform: `rotate(45 ${x.place(bytes)} ${y.place(data.exported.damage)})`,
          fill: shown === data.exported ? "var(--ink)" : "var(--card)", stroke: "var(--ink)", "stroke-width": 1.5, class: "hit", tip: `the exported plan\npredicted ${number(data.exported.damage)}`, onclick: () => show(data.exported) }) : null,
        m && m.value > 0 ? s("g", { tip: `the exported plan\nmeasured ${number(m.value)}` + (m.low === null || m.low === undefined ? "" : `\n95 % ${number(m.low)} to ${number(m.high)}`) },
          m.low > 0 ? s("line", { x1: x.place(bytes), x2: x.place(bytes), y1: y.place(m.low), y2: y.place(m.high), stroke: "var(--bad)", "stroke-width": 2 }) : null,
          s("circle", { cx: x.place(bytes), cy: y.place(m.value), r: 4.5, fill: "var(--bad)" })) : null));
    });
    left.append(h("div", { class: "legend" }, h("span", {}, h("i", { style: "background:var(--accent);border-radius:50%" }), "stored plans"),
      h("span", {}, h("i", { style: "background:var(--ink);transform:rotate(45deg) scale(.8)" }), "exported, predicted"), data.measured ? h("span", {}, h("i", { style: "background:var(--bad);border-radius:50%" }), "exported, measured") : null));
  }
  const body = h("tbody"), name = h("h3", { id: "shown" }), command = h("code"), text = h("textarea", { readonly: "", "aria-label": "the plan as YAML" });
  const back = h("button", { type: "button", id: "back", onclick: () => show(data.exported) }, "back to the exported plan");
  right.append(h("div", { class: "row" }, name, back), h("table", {}, body),
    h("p", { class: "small soft", style: "margin-top:12px" }, "Compile this one: ", command),
    h("details", { class: "small", style: "margin-top:8px" }, h("summary", {}, "its sites, for --plan FILE"), text));
  onShow(() => {
    const exported = shown === data.exported;
    name.textContent = exported ? "The exported plan" : "Another plan of the curve";
    back.style.visibility = exported ? "hidden" : "visible";
    const rows = [["stored", size(shown.bytes), size(data.dense.bytes)], ["bits per weight", number(shown.avg_bits), number(8 * data.dense.bytes / (data.exported.bytes * 8 / data.exported.avg_bits))],
      ["predicted damage", number(shown.damage), "0"], ["sublayers dropped", shown.dropped.length, "0"]];
    if (exported && data.measured) rows.splice(3, 0, ["measured damage", `${number(data.measured.value)} (${number(data.measured.low)} to ${number(data.measured.high)})`, "0"]);
    if (exported && shown.file) rows.splice(1, 0, ["file", size(shown.file), ""]);
    body.replaceChildren(h("tr", {}, h("th"), h("th", { class: "num" }, "plan"), h("th", { class: "num" }, "dense")),
      ...rows.map(([a, b, c]) => h("tr", {}, h("td", { class: "soft" }, a), h("td", { class: "num" }, b), h("td", { class: "num soft" }, c))));
    command.textContent = `--max-size ${shown.bytes}`;
    text.value = `unit: ${data.unit}\nsites:\n` + Object.entries(shown.plan).map(([site, option]) => `  ${JSON.stringify(site)}: ${JSON.stringify(option)}`).join("\n") + "\n";
  });
  function nearest() {
    const gap = (p) => Math.abs(p.bytes - data.exported.bytes);
    return points.reduce((best, p, i) => (gap(p) < gap(points[best]) ? i : best), 0);
  }
}

function heat() {
  if (!data.facets.length) return;
  const values = data.facets.flatMap((f) => f.cells.map((c) => c[2])).filter((v) => v > 0).sort((a, b) => a - b);
  const top = values[values.length - 1] || 1, bottom = Math.min(Math.max(values[Math.floor(values.length * 0.02)] || top / 1e4, top / 1e7), top / 10);
  const place = (v) => (v > bottom ? Math.log(v / bottom) / Math.log(top / bottom) : 0);
  const holder = h("div", { class: "facets" }), legend = h("div", { class: "legend" });
  section("heat", "Damage of every site and option", `Each option alone in the dense model, in ${data.unit}, on a logarithmic scale. The outlined cell is what the plan above carries; a hatched one was refused.`, legend, h("div", { style: "height:14px" }), holder);
  const facets = [...data.facets].sort((a, b) => (a.options.length > 2) - (b.options.length > 2));
  const hatch = () => s("defs", {}, s("pattern", { id: "hatch", width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
    s("rect", { width: 5, height: 5, fill: "var(--paper)" }), s("line", { x1: 0, y1: 0, x2: 0, y2: 5, stroke: "var(--soft)", "stroke-width": 1.2, opacity: 0.55 })));
  onShow(() => {
    const stops = Array.from({ length: 9 }, (_, i) => heatColour(i / 8));
    legend.replaceChildren(h("span", {}, "≤ " + number(bottom)), h("span", { style: `width:180px;height:11px;border-radius:3px;background:linear-gradient(90deg,${stops.join(",")})` }), h("span", {}, number(top)),
      h("span", {}, h("i", { style: "border:2px solid var(--ink)" }), "in the plan"),
      h("span", {}, h("i", { style: "background:repeating-linear-gradient(45deg,var(--paper) 0 2px,var(--soft) 2px 3px)" }), "refused"));
    const dropped = new Set(shown.dropped);
    holder.replaceChildren(...facets.map((facet) => {
      const named = facet.axis === "site", n = facet.columns.length;
      const w = named ? 46 : Math.max(7, Math.min(16, Math.floor(450 / n))), tall = 16;
      const left = 12 + Math.max(...facet.labels.map((l) => l.length)) * 6.3, foot = named ? 10 + Math.max(...facet.columns.map((c) => c.length)) * 3.6 : 20;
      const nodes = [], outlines = [];
      for (const [column, row, damage, spread, bytes, refused] of facet.cells) {
        const site = facet.sites[column], option = facet.options[row], keep = option === "keep";
        const silenced = [...dropped].some((d) => site !== d && site.startsWith(d + "."));
        const chosen = !silenced && (shown.plan[site] || "keep") === option;
        const x = left + column * w, y = row * tall;
        const tip = [site, option, refused ? "refused: " + refused : keep ? "as it is" : `damage ${number(damage)}` + (spread ? ` ± ${number(spread, 2)}` : ""), size(bytes),
          chosen ? "in the plan" : silenced ? "dropped with what is above it" : null].filter(Boolean).join("\n");
        nodes.push(s("rect", { class: "heat" + (refused ? " refused" : ""), x: x + 0.5, y: y + 0.5, width: w - 1, height: tall - 1, tip,
          fill: refused ? "url(#hatch)" : keep ? "var(--card)" : heatColour(place(damage)), stroke: keep ? "var(--line)" : "none", opacity: silenced ? 0.35 : 1 }));
        if (chosen) outlines.push(s("rect", { class: "chosen", x: x + 1, y: y + 1, width: w - 2, height: tall - 2, fill: "none", stroke: "var(--ink)", "stroke-width": 2, "pointer-events": "none", rx: 1 }));
      }
      const height = facet.options.length * tall, rowLabels = facet.labels.map((l, i) => s("text", { x: left - 6, y: i * tall + 12, "text-anchor": "end", tip: facet.options[i] }, l));
      const columnLabels = facet.columns.map((c, i) => named
        ? s("text", { transform: `translate(${left + i * w + w / 2 + 3} ${height + 12}) rotate(-28)`, "text-anchor": "end" }, c)
        : i % (n > 12 ? 5 : 1) === 0 ? s("text", { x: left + i * w + w / 2, y: height + 14, "text-anchor": "middle" }, c) : null);
      return h("div", { class: "facet" }, h("h3", {}, facet.title), chart(left + n * w + 6, height + foot + 4, facet.title, hatch(), nodes, outlines, rowLabels, columnLabels));
    }));
  });
}

function bytes() {
  const holder = h("div"), table = h("tbody");
  section("bytes", "Where the bytes went", null, holder, h("table", { style: "margin-top:14px;max-width:640px" }, table));
  onShow(() => {
    const rows = [["dense", data.dense.parts], [shown === data.exported ? "exported" : "this plan", shown.parts || {}]];
    const total = (parts) => Object.values(parts).reduce((a, b) => a + b, 0), widest = Math.max(1, ...rows.map(([, p]) => total(p)));
    const scale = 900 / widest, names = Object.keys(PART).filter((k) => rows.some(([, p]) => p[k]));
    holder.replaceChildren(chart(1080, rows.length * 44, "bytes by part", rows.map(([title, parts], i) => {
      let x = 76;
      const own = Object.entries(parts).map(([k, v]) => {
        const node = s("rect", { class: "part", x, y: i * 44 + 4, width: Math.max(v * scale - 1, 0.5), height: 32, rx: 2, fill: PART[k] || PART.rest, tip: `${PART_NAME[k] || k}\n${size(v)}, ${(100 * v / total(parts)).toFixed(1)} %` });
        x += v * scale;
        return node;
      });
      return [s("text", { x: 68, y: i * 44 + 24, "text-anchor": "end" }, title), own, s("text", { x: x + 6, y: i * 44 + 24 }, size(total(parts)))];
    })));
    table.replaceChildren(h("tr", {}, h("th"), ...rows.map(([t]) => h("th", { class: "num" }, t)), h("th", { class: "num" }, "share")),
      ...names.map((k) => h("tr", {}, h("td", {}, h("i", { style: `display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:7px;background:${PART[k]}` }), PART_NAME[k] || k),
        ...rows.map(([, p]) => h("td", { class: "num" }, p[k] ? size(p[k]) : "–")), h("td", { class: "num soft" }, (100 * (rows[1][1][k] || 0) / Math.max(total(rows[1][1]), 1)).toFixed(1) + " %"))));
  });
}

function scatter() {
  if (!data.scatter.length && !data.analyses.length) return;
  const node = section("scatter", "Predicted against measured", data.scatter.length ? "Held-out sites: what an analysis predicted, and what changing only that site really costs. On the line, the prediction is right." : null);
  const pairs = data.scatter.filter((p) => p.predicted > 0 && p.measured > 0);
  const side = h("div");
  if (data.scatter.length) {
    const box = { left: 66, right: 520, top: 10, bottom: 350 }, names = [...new Set(pairs.map((p) => p.analysis))];
    const hues = ["#2a6f97", "#c8553d", "#5aa469", "#8c6bb1", "#b8860b", "#555b66"], hue = (a) => hues[names.indexOf(a) % hues.length];
    const all = pairs.flatMap((p) => [p.predicted, p.measured]), whole = data.measured && data.exported.damage > 0 && data.measured.value > 0;
    if (whole) all.push(data.measured.value, data.exported.damage);
    const x = logScale(all, box.left, box.right), y = logScale(all, box.bottom, box.top);
    const left = h("div", {}, chart(540, 392, "predicted against measured damage", axes(x, y, box, "predicted, " + data.unit, "measured, " + data.unit),
      s("line", { x1: box.left, y1: box.bottom, x2: box.right, y2: box.top, stroke: "var(--soft)", "stroke-dasharray": "4 4" }),
      pairs.map((p) => s("circle", { class: "pair", cx: x.place(p.predicted), cy: y.place(p.measured), r: 4, fill: hue(p.analysis), "fill-opacity": 0.65,
        tip: `${p.site}\n${p.option || ""}\n${p.analysis}: predicted ${number(p.predicted)}, measured ${number(p.measured)}` })),
      whole ? s("rect", { x: x.place(data.exported.damage) - 6, y: y.place(data.measured.value) - 6, width: 12, height: 12, fill: "none", stroke: "var(--ink)", "stroke-width": 2, transform: `rotate(45 ${x.place(data.exported.damage)} ${y.place(data.measured.value)})`, tip: `the whole plan\npredicted ${number(data.exported.damage)}, measured ${number(data.measured.value)}` }) : null),
      h("div", { class: "legend" }, names.map((a) => h("span", {}, h("i", { style: `background:${hue(a)};border-radius:50%` }), a)), whole ? h("span", {}, "◇ the whole plan") : null));
    node.append(h("div", { class: "choose" }, left, side));
  } else node.append(side);
  const heads = [["name", "analysis"], ["seconds", "seconds"], ["spearman", "rank correlation"], ["plan_predicted", "its plan, predicted"], ["plan_measured", "its plan, measured"]];
  const used = heads.filter(([k]) => data.analyses.some((a) => a[k] !== undefined && a[k] !== null));
  const plain = (v) => (typeof v === "number" ? number(v) : v === undefined || v === null ? "–" : typeof v === "object" ? number(v.value ?? v.mean) : v);
  if (data.analyses.length) side.append(h("h3", {}, "What each analysis cost, and how well it ranked"),
    h("table", {}, h("tr", {}, used.map(([k, t]) => h("th", { class: k === "name" ? "" : "num" }, t))), data.analyses.map((a) => h("tr", {}, used.map(([k]) => h("td", { class: k === "name" ? "" : "num" }, plain(a[k])))))));
}

function remarks() {
  const count = (k) => data.remarks.filter((r) => r.kind === k).length;
  const kinds = [...new Set(data.remarks.map((r) => r.kind))].sort();
  const search = h("input", { type: "search", id: "filter", placeholder: "filter by site, pass or word", style: "flex:1;min-width:220px", oninput: () => draw() });
  const select = h("select", { id: "kind", "aria-label": "kind of remark", onchange: () => draw() }, h("option", { value: "" }, `all (${data.remarks.length})`), kinds.map((k) => h("option", { value: k }, `${k} (${count(k)})`)));
  const body = h("tbody"), note = h("p", { class: "small soft" });
  section("remarks", "What was done, and what was refused", null, h("div", { class: "row", style: "margin-top:8px" }, search, select),
    h("div", { class: "remarks" }, h("table", {}, h("thead", {}, h("tr", {}, ["", "pass", "site", "what and why", ""].map((t) => h("th", {}, t)))), body)), note);
  const LIMIT = 400;
  function draw() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const found = data.remarks.filter((r) => (!select.value || r.kind === select.value) && words.every((w) => `${r.pass} ${r.site} ${r.text} ${r.numbers}`.toLowerCase().includes(w)));
    body.replaceChildren(...found.slice(0, LIMIT).map((r) => h("tr", {}, h("td", {}, h("span", { class: "kind " + r.kind }, r.kind)), h("td", {}, r.pass), h("td", { class: "mono" }, r.site), h("td", {}, r.text), h("td", { class: "soft" }, r.numbers))));
    note.textContent = found.length > LIMIT ? `${LIMIT} of ${found.length} shown; filter to see the others` : found.length ? "" : "nothing matches";
  }
  draw();
}

function details() {
  if (!data.tables.length) return;
  section("details", "Everything else", null, h("div", { class: "tables", style: "margin-top:12px" }, data.tables.map((t) => h("div", {}, h("h3", {}, t.title),
    h("table", {}, t.rows.map(([k, v]) => h("tr", {}, h("td", {}, k.replaceAll("_", " ")), h("td", {}, v))))))));
}

function tooltips() {
  const tip = h("div", { class: "tip", role: "status" });
  document.body.append(tip);
  document.addEventListener("pointermove", (event) => {
    let node = event.target;
    while (node && !tips.has(node)) node = node.parentNode;
    tip.classList.toggle("on", Boolean(node));
    if (!node) return;
    tip.textContent = tips.get(node);
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
    tip.style.top = (event.clientY + box.height + 24 > innerHeight ? event.clientY - box.height - 10 : event.clientY + 16) + "px";
  });
}

header();
strip();
pareto();
heat();
bytes();
scatter();
remarks();
details();
tooltips();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const draw of listeners) draw(); });
const linked = location.hash.match(/^#point=(\d+)$/);
if (linked && points[+linked[1]]) show(points[+linked[1]]);
document.documentElement.dataset.ready = "true";
