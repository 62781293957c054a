// Charts as SVG, drawn to the width they have: lines with a crosshair, and what numbers look like.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function element(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") node.style.cssText = value;
    else node.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) if (child !== null && child !== undefined) node.append(child);
  return node;
}

function shape(parent, tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

// Numbers -----------------------------------------------------------------------------------------------------------

function digits(value, significant = 3) {
  if (value === 0) return "0";
  const size = Math.floor(Math.log10(Math.abs(value)));
  const decimals = Math.max(0, Math.min(6, significant - 1 - size));
  return value.toLocaleString("en-US", { minimumFractionDigits: 0, maximumFractionDigits: decimals });
}

function scaled(value, steps, significant) {
  const [factor, unit] = steps.find(([least]) => Math.abs(value) >= least) || steps[steps.length - 1];
  return digits(value / factor, significant) + "\u00a0" + unit;
}

const FORMAT = {
  seconds: (v, n) => v === 0 ? "0 s" : Math.abs(v) >= 600 ? digits(v / 60, n) + "\u00a0min"
    : scaled(v, [[1, "s"], [1e-3, "ms"], [1e-6, "µs"], [1e-9, "ns"]], n),
  bytes: (v, n) => v === 0 ? "0 B" : scaled(v, [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"], [1, "B"]], n),
  rate: (v, n) => v === 0 ? "0 B/s" : scaled(v, [[1e12, "TB/s"], [1e9, "GB/s"], [1e6, "MB/s"], [1e3, "kB/s"], [1, "B/s"]], n),
  share: (v, n) => digits(v * 100, n) + "\u00a0%",
  number: (v, n) => digits(v, n),
  perSecond: (v, n) => digits(v, n) + " /s",
  usd: (v, n) => v >= 100 ? "$" + digits(v, 3) : "$" + v.toFixed(v < 1 ? 3 : 2),
};

function show(kind, value, significant = 3) {
  return value === null || value === undefined || !isFinite(value) ? "–" : FORMAT[kind](value, significant);
}

// Axes --------------------------------------------------------------------------------------------------------------

function niceTicks(low, high, count) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough) || 10 * power;
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  const leads = decades > count ? [1] : decades * 2 > count ? [1, 3] : decades * 3 > count ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const lead of leads) {
      const tick = lead * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  return ticks.length > 1 ? ticks : niceTicks(low, high, count);
}

function scale(low, high, from, to, log) {
  if (log) {
    const a = Math.log(low), b = Math.log(high) - a || 1;
    const map = (v) => from + ((Math.log(Math.max(v, low * 1e-3)) - a) / b) * (to - from);
    map.invert = (p) => Math.exp(a + ((p - from) / (to - from)) * b);
    return map;
  }
  const span = high - low || 1;
  const map = (v) => from + ((v - low) / span) * (to - from);
  map.invert = (p) => low + ((p - from) / (to - from)) * span;
  return map;
}

// A line chart ------------------------------------------------------------------------------------------------------
// options: {title, unit, lines: [{name, color, points: [[x, y]...], step, dots, fill, dash}], x: {kind, name, log, low, high},
//           y: {kind, name, low, high}, targets: [{x|y, name}], height, extra: node for the head, label}

function chart(options) {
  const plot = element("div", { class: "plot" });
  const unit = options.unit ? element("span", { class: "unit" }, options.unit) : null;
  const figure = element("figure", { "data-chart": options.title },
    element("div", { class: "head" }, element("h3", {}, options.title, unit), options.extra || null), plot);
  const tip = element("div", { class: "tip", role: "status" });
  let width = 0;
  const draw = () => {
    plot.replaceChildren();
    tip.style.visibility = "hidden";
    if (options.lines.some((line) => line.points.length)) plot.append(drawLines(plot, tip, options, width), tip);
    else plot.append(element("div", { class: "empty" }, options.emptyText || "nothing was recorded"));
  };
  figure.fit = () => {
    const now = Math.floor(plot.clientWidth);
    if (now && now !== width) { width = now; draw(); }
  };
  new ResizeObserver(() => requestAnimationFrame(figure.fit)).observe(plot);
  figure.redraw = (change) => { Object.assign(options, change); if (width) draw(); };
  return figure;
}

// Draw what is on the page now; later changes of width are seen by each chart itself.
function fitAll() {
  for (const figure of document.querySelectorAll("figure")) figure.fit();
}

function extent(lines, axis, options) {
  let low = Infinity, high = -Infinity;
  for (const line of lines) for (const point of line.points) {
    const value = point[axis];
    if (!isFinite(value) || (options.log && value <= 0)) continue;
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (!isFinite(low)) [low, high] = options.log ? [1, 10] : [0, 1];
  low = options.low ?? low;
  high = options.high ?? high;
  if (low === high) { high = low === 0 ? 1 : low * (options.log ? 1.2 : 1.05); if (options.log) low /= 1.2; }
  return [low, high];
}

function drawLines(plot, tip, options, width) {
  const height = options.height || 220;
  const [xLow, xHigh] = extent(options.lines, 0, options.x);
  let [yLow, yHigh] = extent(options.lines, 1, { low: 0, ...options.y });
  if (options.y.high === undefined) yHigh += (yHigh - yLow) * 0.06;
  const yTicks = niceTicks(yLow, yHigh, Math.max(2, Math.floor(height / 42)));
  const yTexts = axisTexts(options.y.kind, yTicks);
  const left = Math.max(30, 9 + 6.6 * Math.max(...yTexts.map((text) => text.length)));
  const right = width - 12, top = 10, bottom = height - 36;
  const x = Object.assign(scale(xLow, xHigh, left, right, options.x.log), { high: xHigh }), y = scale(yLow, yHigh, bottom, top, false);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", `${options.title}: ${options.lines.map((line) => line.name).join(", ")}`);
  yTicks.forEach((tick, k) => {
    shape(svg, "line", { class: tick === 0 ? "baseline" : "gridline", x1: left, x2: right, y1: y(tick), y2: y(tick) });
    shape(svg, "text", { class: "axis", x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, yTexts[k]);
  });
  const room = Math.max(2, Math.floor((right - left) / 64));
  let xTicks = options.x.log ? logTicks(xLow, xHigh, room) : niceTicks(xLow, xHigh, room);
  while (xTicks.length > room + 1) xTicks = xTicks.filter((_, k) => k % 2 === 0);
  let taken = -Infinity;
  axisTexts(options.x.kind, xTicks, options.x.log).forEach((text, k) => {
    const half = text.length * 3.3 + 5;
    if (x(xTicks[k]) - half < taken) return;
    taken = x(xTicks[k]) + half;
    shape(svg, "line", { class: "gridline", x1: x(xTicks[k]), x2: x(xTicks[k]), y1: bottom, y2: bottom + 4 });
    const anchor = x(xTicks[k]) > right - 16 ? "end" : "middle";
    shape(svg, "text", { class: "axis", x: Math.min(right, x(xTicks[k])), y: bottom + 17, "text-anchor": anchor }, text);
  });
  if (options.x.name) shape(svg, "text", { class: "axis", x: right, y: height - 4, "text-anchor": "end" }, options.x.name);
  for (const target of options.targets || []) drawTarget(svg, target, x, y, { left, right, top, bottom, xLow, xHigh, yHigh });
  for (const line of options.lines) drawLine(svg, line, x, y, bottom);
  addCrosshair(svg, plot, tip, options, { x, y, left, right, top, bottom, width });
  return svg;
}

function axisTexts(kind, ticks, log) {
  const texts = ticks.map((tick) => FORMAT[kind](tick, 3));
  if (log || texts.length < 2) return texts;
  // One unit along an axis reads better than 900 ms, 1 s, 1.1 s.
  const largest = ticks[ticks.length - 1];
  const unit = { seconds: [[600, 60, "min"], [1, 1, "s"], [1e-3, 1e-3, "ms"], [0, 1e-6, "µs"]],
    bytes: [[1e9, 1e9, "GB"], [1e6, 1e6, "MB"], [1e3, 1e3, "kB"], [0, 1, "B"]],
    rate: [[1e12, 1e12, "TB/s"], [1e9, 1e9, "GB/s"], [1e6, 1e6, "MB/s"], [1e3, 1e3, "kB/s"], [0, 1, "B/s"]] }[kind];
  if (!unit) return texts;
  const [, factor, name] = unit.find(([least]) => largest >= least);
  return ticks.map((tick) => tick === 0 ? "0" : digits(tick / factor, 4) + " " + name);
}

function drawTarget(svg, target, x, y, box) {
  if (target.x !== undefined) {
    if (target.x < box.xLow || target.x > box.xHigh) return;
    const at = x(target.x);
    shape(svg, "line", { class: "target", x1: at, x2: at, y1: box.top, y2: box.bottom });
    const end = at > box.right - 70;
    shape(svg, "text", { class: "target-name", x: at + (end ? -5 : 5), y: box.bottom - 6, "text-anchor": end ? "end" : "start" }, target.name);
  } else if (target.y <= box.yHigh) {
    const at = y(target.y);
    shape(svg, "line", { class: "target", x1: box.left, x2: box.right, y1: at, y2: at });
    shape(svg, "text", { class: "target-name", x: box.right, y: at + 14, "text-anchor": "end" }, target.name);
  }
}

function drawLine(svg, line, x, y, bottom) {
  let path = "", previous = null;
  for (const [px, py] of line.points) {
    if (!isFinite(px) || !isFinite(py) || px > x.high) continue;
    const at = [x(px), y(py)];
    if (previous === null) path = `M${at[0].toFixed(1)},${at[1].toFixed(1)}`;
    else path += line.step ? `H${at[0].toFixed(1)}V${at[1].toFixed(1)}` : `L${at[0].toFixed(1)},${at[1].toFixed(1)}`;
    previous = at;
  }
  if (line.fill && previous) {
    const first = line.points[0];
    shape(svg, "path", { d: `${path}V${bottom}H${x(first[0]).toFixed(1)}Z`, fill: line.color, opacity: 0.14 });
  }
  shape(svg, "path", { d: path, fill: "none", stroke: line.color, "stroke-width": line.thin ? 1.3 : 1.9,
    "stroke-linejoin": "round", "stroke-dasharray": line.dash || "none" });
  if (line.dots) for (const [px, py] of line.points) shape(svg, "circle", { cx: x(px), cy: y(py), r: 3.2, fill: line.color });
}

function addCrosshair(svg, plot, tip, options, box) {
  const cursor = shape(svg, "line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" });
  const dots = options.lines.map((line) => shape(svg, "circle", { r: 3.6, fill: line.color, visibility: "hidden" }));
  const hide = () => { cursor.setAttribute("visibility", "hidden"); tip.style.visibility = "hidden"; dots.forEach((d) => d.setAttribute("visibility", "hidden")); };
  const move = (event) => {
    const at = Math.min(box.right, Math.max(box.left, event.clientX - plot.getBoundingClientRect().left));
    const wanted = box.x.invert(at);
    cursor.setAttribute("x1", at); cursor.setAttribute("x2", at); cursor.setAttribute("visibility", "visible");
    const rows = options.lines.map((line, k) => {
      const value = valueAt(line, wanted);
      dots[k].setAttribute("visibility", value === null ? "hidden" : "visible");
      if (value !== null) { dots[k].setAttribute("cx", at); dots[k].setAttribute("cy", box.y(value)); }
      return element("div", { class: "row" },
        element("span", {}, element("i", { class: "swatch", style: `background:${line.color}` }), line.name),
        element("span", {}, value === null ? "–" : FORMAT[options.y.kind](value, 3)));
    });
    tip.replaceChildren(element("div", { class: "when" }, options.x.tip ? options.x.tip(wanted) : show(options.x.kind, wanted, 4)), ...rows);
    tip.style.visibility = "visible";
    tip.style.left = "0";
    const wide = tip.offsetWidth;
    tip.style.left = `${at + 14 + wide > box.width ? Math.max(0, at - wide - 14) : at + 14}px`;
    tip.style.top = `${box.top}px`;
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", hide);
}

function valueAt(line, wanted) {
  const points = line.points;
  if (!points.length || wanted < points[0][0] || wanted > points[points.length - 1][0]) {
    return line.dots && points.length ? nearest(points, wanted) : null;
  }
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= wanted) low = middle; else high = middle;
  }
  if (line.step || points[high][0] === points[low][0]) return points[low][1];
  const share = (wanted - points[low][0]) / (points[high][0] - points[low][0]);
  return points[low][1] + share * (points[high][1] - points[low][1]);
}

function nearest(points, wanted) {
  return points.reduce((best, point) => Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best)[1];
}
