// Lays the page out from the data that is embedded in it. All words of a result go in as text, never as markup.
"use strict";

const DATA = JSON.parse(document.getElementById("report-data").textContent);
const RESULTS = DATA.results;
const PAGE = document.getElementById("page");
const color = (index) => `var(--s${index % 8})`;
const stateOf = { shown: new Set(RESULTS.map((_, index) => index).slice(0, 8)), chosen: 0 };
const stagePalette = ["--s0", "--s1", "--s2", "--s3", "--s4", "--s6", "--s7", "--s5"];

function badge(result) {
  const word = result.simulated ? "simulated" : "measured";
  return element("span", { class: `badge ${word}` }, word);
}

function heading(text, lead) {
  return [element("h2", {}, text), lead ? element("p", { class: "lead" }, lead) : element("p", { class: "lead" })];
}

// Head --------------------------------------------------------------------------------------------------------------

function head() {
  const only = RESULTS.length === 1 ? RESULTS[0] : null;
  const under = only ? `${only.model} · ${only.workload} · seed ${only.seed}`
    : `${RESULTS.length} results: ` + [...new Set(RESULTS.map((result) => result.workload))].slice(0, 3).join(" · ");
  const kinds = [...new Set(RESULTS.map((result) => result.simulated))].map((simulated) => badge({ simulated }));
  const themes = ["auto", "light", "dark"];
  const button = element("button", { title: "colours", onclick: () => {
    const now = themes[(themes.indexOf(document.documentElement.dataset.theme || "auto") + 1) % 3];
    if (now === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = now;
    button.textContent = `◐ ${now}`;
  } }, "◐ auto");
  return element("header", { class: "top" },
    element("div", {}, element("h1", {}, only ? only.label : DATA.title, " ", ...kinds), element("p", { class: "under" }, under)), button);
}

function interval(range, value, kind) {
  if (!range || !value) return null;
  return `${show(kind, value * range.low)} to ${show(kind, value * range.high)}`;
}

function tile(name, value, notes, bad) {
  return element("div", { class: "tile" }, element("div", { class: "name" }, name), element("div", { class: "value" }, value),
    notes.filter(Boolean).map((note) => element("div", { class: `note${bad ? " bad" : ""}` }, note)));
}

function tiles(result) {
  const s = result.summary, cost = result.cost, list = [];
  const latency = (name, d, range, target) => d && list.push(tile(name, [show("seconds", d.p50)],
    [`p90 ${show("seconds", d.p90)}`, `p99 ${show("seconds", d.p99)}`,
      range ? `likely ${interval(range, d.p50, "seconds")}` : null, target ? `target ${show("seconds", target)}` : null]));
  latency("TTFT, median", s.ttft_seconds, result.ttft_interval, s.targets.ttft_seconds);
  latency("TPOT, median", s.tpot_seconds, result.tpot_interval, s.targets.tpot_seconds);
  list.push(tile("output tokens/s", digits(s.output_tokens_per_second),
    [`${digits(s.requests_per_second)} requests/s` + (s.offered_requests_per_second ? ` of ${digits(s.offered_requests_per_second)} offered` : "")]));
  if (s.meets_targets !== null && s.meets_targets !== undefined)
    list.push(tile("good requests/s", digits(s.goodput_requests_per_second),
      [`${show("share", s.attainment)} within targets, ${s.meets_targets ? "meets" : "misses"} ${show("share", s.targets.attainment)}`], !s.meets_targets));
  if (cost && cost.usd_per_million_output_tokens !== null)
    list.push(tile("cost", [show("usd", cost.usd_per_million_output_tokens)], ["per million output tokens", `${cost.num_chips} chips`]));
  if (cost && cost.joules_per_output_token !== null)
    list.push(tile("energy", [digits(cost.joules_per_output_token) + "\u00a0J"],
      ["per output token", cost.mean_watts === null ? null : `${digits(cost.mean_watts / 1000)} kW on average`]));
  const failed = s.num_failed + (s.num_interrupted || 0);
  list.push(tile("requests", s.num_successful.toLocaleString("en-US"), [`in ${show("seconds", s.duration_seconds)}, at most ${s.peak_in_flight.toLocaleString("en-US")} at once`,
    failed ? `${s.num_failed} failed` : null], failed > 0));
  return element("div", { class: "tiles" }, list);
}

// Comparison --------------------------------------------------------------------------------------------------------

const ROWS = [
  ["Latency"],
  ["TTFT p50", (r) => r.summary.ttft_seconds?.p50, "seconds", "low"], ["TTFT p90", (r) => r.summary.ttft_seconds?.p90, "seconds", "low"],
  ["TTFT p99", (r) => r.summary.ttft_seconds?.p99, "seconds", "low"], ["TPOT p50", (r) => r.summary.tpot_seconds?.p50, "seconds", "low"],
  ["TPOT p90", (r) => r.summary.tpot_seconds?.p90, "seconds", "low"], ["TPOT p99", (r) => r.summary.tpot_seconds?.p99, "seconds", "low"],
  ["ITL p99", (r) => r.summary.itl_seconds?.p99, "seconds", "low"],
  ["Throughput"],
  ["offered", (r) => r.summary.offered_requests_per_second, "perSecond"], ["requests", (r) => r.summary.requests_per_second, "perSecond", "high"],
  ["output tokens", (r) => r.summary.output_tokens_per_second, "perSecond", "high"],
  ["goodput", (r) => r.summary.meets_targets === null ? null : r.summary.goodput_requests_per_second, "perSecond", "high"],
  ["attainment", (r) => r.summary.meets_targets === null ? null : r.summary.attainment, "share", "high"],
  ["failed", (r) => r.summary.num_failed, "number", "low"],
  ["Cost"],
  ["chips", (r) => r.cost?.num_chips, "number"], ["$ per M output tokens", (r) => r.cost?.usd_per_million_output_tokens, "usd", "low"],
  ["J per output token", (r) => r.cost?.joules_per_output_token, "number", "low"],
  ["output tokens /s per chip", (r) => r.cost?.num_chips ? r.summary.output_tokens_per_second / r.cost.num_chips : null, "number", "high"],
  ["Between pools"],
  ["bytes over links", (r) => r.links.length ? r.links.reduce((sum, link) => sum + link.num_bytes, 0) : null, "bytes"],
  ["exposed transfer a request", (r) => r.links.length && r.summary.num_successful ? r.links.reduce((sum, link) => sum + link.exposed_seconds, 0) / r.summary.num_successful : null, "seconds", "low"],
];

function comparison() {
  const body = element("tbody");
  let group = null;
  const rates = RESULTS.map((result) => result.summary.offered_requests_per_second || 0);
  const sameLoad = Math.max(...rates) <= Math.min(...rates) * 1.05;
  for (const [name, value, kind, better] of ROWS) {
    if (!value) { group = element("tr", { class: "group" }, element("th", { colspan: RESULTS.length + 1 }, name)); continue; }
    const values = RESULTS.map((result) => { const v = value(result); return v === undefined || v === null || !isFinite(v) ? null : v; });
    if (values.every((v) => v === null)) continue;
    if (group) { body.append(group); group = null; }
    const known = values.filter((v) => v !== null);
    const best = better && sameLoad && known.length > 1 && new Set(known).size > 1 ? (better === "low" ? Math.min(...known) : Math.max(...known)) : null;
    body.append(element("tr", {}, element("th", { scope: "row" }, name),
      values.map((v) => element("td", { class: v !== null && v === best ? "best" : null }, show(kind, v)))));
  }
  const bottlenecks = RESULTS.map((result) => result.bottleneck);
  if (bottlenecks.some(Boolean)) body.append(element("tr", {}, element("th", { scope: "row" }, "bottleneck"), bottlenecks.map((b) => element("td", { class: "text" }, b || "–"))));
  return [heading("Side by side", (sameLoad ? "The best of each row in bold. " : "") + "Latencies are of successful requests and count from when a request was due."),
    element("div", { class: "scroll" }, element("table", { class: "side" }, element("thead", {}, element("tr", {}, element("th"),
      RESULTS.map((result, k) => element("th", { scope: "col" }, element("span", { class: "column" }, element("i", { class: "swatch", style: `background:${color(k)}` }), result.label), element("br"), badge(result))))), body))];
}

// Latency -----------------------------------------------------------------------------------------------------------

const LATENCIES = [["ttft", "Time to first token", "ttft_seconds"], ["tpot", "Time per output token", "tpot_seconds"],
  ["itl", "Inter-token latency", null], ["end_to_end", "End to end", null]];

function cdfLines(key) {
  return [...stateOf.shown].sort((a, b) => a - b).map((k) => ({ name: RESULTS[k].label, color: color(k), dash: k > 7 ? "5 3" : null,
    points: (RESULTS[k].curves[key] || []).map(([share, seconds]) => [seconds, share]) }));
}

function histogramLines(key) {
  const chosen = [...stateOf.shown].sort((a, b) => a - b);
  const curves = chosen.map((k) => RESULTS[k].curves[key] || []).filter((curve) => curve.length > 2);
  if (!curves.length) return [];
  const low = Math.min(...curves.map((curve) => curve[0][1])), high = Math.max(...curves.map((curve) => atShare(curve, 0.99)));
  const bins = 36, wide = (high - low) / bins || 1;
  return chosen.map((k) => {
    const curve = RESULTS[k].curves[key] || [], counts = new Array(bins).fill(0);
    for (let i = 1; i < curve.length; i++) {
      const [fromShare, from] = curve[i - 1], [toShare, to] = curve[i];
      const first = Math.floor((from - low) / wide), last = Math.min(bins, Math.floor((to - low) / wide));
      for (let bin = first; bin <= last && bin < bins; bin++) {
        const overlap = to > from ? Math.max(0, Math.min(to, low + (bin + 1) * wide) - Math.max(from, low + bin * wide)) / (to - from) : 1;
        counts[bin] += overlap * (toShare - fromShare);
      }
    }
    return { name: RESULTS[k].label, color: color(k), step: true, fill: true,
      points: [...counts.map((count, bin) => [low + bin * wide, count]), [high, 0]] };
  });
}

// The value at a share of a distribution's points.
function atShare(curve, share) {
  const next = curve.findIndex(([s]) => s >= share);
  if (next < 0) return curve[curve.length - 1][1];
  if (next === 0) return curve[0][1];
  const [s0, v0] = curve[next - 1], [s1, v1] = curve[next];
  return s1 > s0 ? v0 + (v1 - v0) * (share - s0) / (s1 - s0) : v1;
}

function spread(key) {
  const curves = RESULTS.map((result) => result.curves[key] || []).filter((curve) => curve.length);
  if (!curves.length) return 1;
  const low = Math.min(...curves.map((curve) => atShare(curve, 0.02)));
  return Math.max(...curves.map((curve) => curve[curve.length - 1][1])) / Math.max(low, 1e-9);
}

// A few late ones would press everybody else into a corner.
function cutoff(key) {
  const curves = RESULTS.map((result) => result.curves[key] || []).filter((curve) => curve.length > 7);
  if (!curves.length) return undefined;
  const high = Math.max(...curves.map((curve) => curve[curve.length - 1][1]));
  const most = Math.max(...curves.map((curve) => atShare(curve, 0.99)));
  return high > 1.4 * most ? most : undefined;
}

function latencyChart([key, title, targetField]) {
  const targets = [...new Set(RESULTS.map((r) => targetField && r.summary.targets[targetField]).filter(Boolean))].map((x) => ({ x, name: `target ${show("seconds", x)}` }));
  const log = spread(key) > 25;
  const cut = cutoff(key);
  let mode = "CDF";
  const now = () => mode === "CDF"
    ? { lines: cdfLines(key), x: { kind: "seconds", log, name: [log ? "log scale" : null, cut ? "up to p99" : null].filter(Boolean).join(", "), high: cut }, y: { kind: "share", high: 1 } }
    : { lines: histogramLines(key), x: { kind: "seconds", name: "up to p99" }, y: { kind: "share" } };
  const buttons = ["CDF", "histogram"].map((name) => element("button", { "aria-pressed": String(name === mode), onclick: () => {
    mode = name;
    buttons.forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === mode)));
    figure.redraw(now());
  } }, name));
  const figure = chart({ title, targets, ...now(), extra: element("div", { class: "switch" }, buttons), emptyText: "the result holds no times of single requests" });
  figure.renew = () => figure.redraw(now());
  return figure;
}

function legend(figures) {
  if (RESULTS.length < 2) return null;
  return element("div", { class: "legend" }, RESULTS.map((result, k) => {
    const button = element("button", { "aria-pressed": String(stateOf.shown.has(k)), onclick: () => {
      if (stateOf.shown.has(k)) stateOf.shown.delete(k); else stateOf.shown.add(k);
      button.setAttribute("aria-pressed", String(stateOf.shown.has(k)));
      figures.forEach((figure) => figure.renew());
    } }, element("i", { class: "swatch", style: `background:${color(k)}` }), result.label);
    return button;
  }));
}

function latencies() {
  const figures = LATENCIES.filter(([key]) => RESULTS.some((r) => (r.curves[key] || []).length)).map(latencyChart);
  const lead = "Share of requests (of gaps between tokens, for ITL) that took at most so long.";
  return [heading("Latency", lead), legend(figures), element("div", { class: "grid wide" }, figures)];
}

// Rate --------------------------------------------------------------------------------------------------------------

function sweeps() {
  if (!DATA.sweeps.length) return null;
  const rateAxis = { kind: "perSecond", name: "requests offered" };
  const lines = (key, kind) => DATA.sweeps.map((sweep, k) => ({ name: sweep.name, color: color(k), dots: true,
    points: sweep.points.filter((p) => p[key] !== null).map((p) => [p.offered, p[key]]) }));
  const targetOf = (field) => [...new Set(RESULTS.map((r) => r.summary.targets[field]).filter(Boolean))].map((y) => ({ y, name: `target ${show("seconds", y)}` }));
  const figures = [
    chart({ title: "Goodput", unit: "within targets", lines: lines("goodput"), x: rateAxis, y: { kind: "perSecond" } }),
    chart({ title: "Attainment", lines: lines("attainment"), x: rateAxis, y: { kind: "share", high: 1.02 }, targets: [...new Set(RESULTS.map((r) => r.summary.targets.attainment))].map((y) => ({ y, name: `wanted ${show("share", y)}` })) }),
    chart({ title: "Output tokens", lines: lines("output_tokens"), x: rateAxis, y: { kind: "perSecond" } }),
    chart({ title: "TTFT p90", lines: lines("ttft_p90"), x: rateAxis, y: { kind: "seconds" }, targets: targetOf("ttft_seconds") }),
    chart({ title: "TPOT p90", lines: lines("tpot_p90"), x: rateAxis, y: { kind: "seconds" }, targets: targetOf("tpot_seconds") }),
  ].filter((figure, k) => k > 1 || DATA.sweeps.some((sweep) => sweep.has_targets));
  const keys = element("div", { class: "legend" }, DATA.sweeps.map((sweep, k) => element("span", { class: "key" },
    element("i", { class: "swatch", style: `background:${color(k)}` }), sweep.name, " ", badge(sweep))));
  return [heading("Against the offered rate", "One point a run."), keys, element("div", { class: "grid" }, figures)];
}

// One result: pools, links, waterfalls, what it rests on ------------------------------------------------------------

function pools(result) {
  if (!result.pools.length) return null;
  const axis = { kind: "seconds", name: "since the run began" };
  const line = (field) => result.pools.map((pool, k) => ({ name: pool.name, color: color(k), step: true, thin: true,
    points: pool.series.map((sample) => [sample.seconds, sample[field]]) }));
  const figures = [["Busy", "busy_share", "share", 1], ["Batch", "batch", "number"], ["Waiting requests", "waiting", "number"], ["KV cache in use", "kv_share", "share"]]
    .map(([title, field, kind, high]) => chart({ title, lines: line(field), x: axis, y: high ? { kind, high } : { kind }, height: 190,
      unit: { busy_share: "of the time, mean over workers", batch: "requests in a step", waiting: "mean of a worker", kv_share: "of its blocks" }[field] }));
  const row = (pool, k) => element("tr", {},
    element("td", {}, element("i", { class: "swatch", style: `background:${color(k)}` }), pool.name), element("td", { class: "text" }, pool.role), element("td", { class: "text" }, pool.chip),
    [[pool.num_workers, "number"], [pool.num_chips, "number"], [pool.busy_share, "share"], [pool.mean_batch, "number"], [pool.num_prefill_tokens, "number"], [pool.num_decode_tokens, "number"],
      [pool.num_preemptions, "number"], [pool.peak_kv_share, "share"]].map(([value, kind]) => element("td", {}, show(kind, value, kind === "number" && value > 999 ? 9 : 3))));
  const columns = ["workers", "chips", "busy", "batch", "prefill tokens", "decode tokens", "preemptions", "peak KV"];
  return [heading("Pools"), element("div", { class: "scroll", style: "margin-bottom:14px" }, element("table", {},
    element("thead", {}, element("tr", {}, element("th", {}, "pool"), element("th", { class: "text" }, "role"), element("th", { class: "text" }, "chip"), columns.map((name) => element("th", {}, name)))),
    element("tbody", {}, result.pools.map(row)))), element("div", { class: "grid wide" }, figures)];
}

function links(result) {
  if (!result.links.length) return null;
  const name = (link) => `${link.source} → ${link.target}`;
  const lines = result.links.map((link, k) => ({ name: name(link), color: color(k), step: true, thin: true, fill: result.links.length === 1, points: link.series.map((s) => [s.seconds, s.bytes_per_second]) }));
  const rows = result.links.map((link, k) => element("tr", {},
    element("td", {}, element("i", { class: "swatch", style: `background:${color(k)}` }), name(link)), element("td", { class: "text" }, `${link.crosses === "kv" ? "KV cache" : link.crosses}, ${link.kind}`),
    [[link.num_transfers, "number"], [link.num_bytes, "bytes"], [link.num_transfers ? link.num_bytes / link.num_transfers : null, "bytes"], [link.busy_seconds / (result.summary.duration_seconds || 1), "share"],
      [link.num_transfers ? link.wire_seconds / link.num_transfers : null, "seconds"], [link.num_transfers ? link.exposed_seconds / link.num_transfers : null, "seconds"], [link.bytes_per_second_limit, "rate"]]
      .map(([value, kind]) => element("td", {}, show(kind, value, kind === "number" ? 9 : 3)))));
  return [heading("Links", "What crosses between pools. Exposed is what a request waits for after its prompt is computed; the rest hides behind the prefill."),
    element("div", { class: "scroll", style: "margin-bottom:14px" }, element("table", {}, element("thead", {}, element("tr", {}, element("th", {}, "link"), element("th", { class: "text" }, "what"),
      ["transfers", "bytes", "a transfer", "busy", "on the wire", "exposed", "port limit"].map((text) => element("th", {}, text)))), element("tbody", {}, rows))),
    element("div", { class: "grid wide" }, chart({ title: "Bytes on the links", unit: "all workers of a pair of pools", lines, x: { kind: "seconds", name: "since the run began" }, y: { kind: "rate" }, height: 200 }))];
}

function splits(result) {
  if (!(result.splits || []).length) return null;
  const cell = (value, kind) => element("td", {}, show(kind, value, 3));
  const rows = result.splits.map((split) => element("tr", {},
    element("td", {}, `${split.attention} → ${split.ffn}`), element("td", { class: "text" }, `${split.attention_workers}:${split.ffn_workers}, ${split.micro_batches} micro-batches`),
    cell(split.step_seconds, "seconds"), cell(split.attention_busy, "share"), cell(1 - split.attention_busy, "share"), cell(split.ffn_busy, "share"), cell(1 - split.ffn_busy, "share"),
    cell(split.crossing_bytes, "bytes"), cell(split.bytes_per_token, "bytes"), cell(split.exposed_hop_seconds, "seconds"), cell(split.step_seconds ? split.exposed_hop_seconds / split.step_seconds : null, "share"),
    element("td", { class: "text" }, split.waits_for)));
  const losses = (result.ffn_losses || []).map((loss) => element("p", {},
    `${loss.worker} died at ${loss.at_seconds.toFixed(2)} s and was back at ${loss.back_seconds.toFixed(2)} s: ${loss.num_steps} steps felt it, the longest by ${(loss.longest_delay_seconds * 1000).toFixed(1)} ms; `
    + `${loss.num_retries} calls were asked of others, ${loss.num_computed_here} computed by attention workers, ${loss.num_failed_steps} steps failed.`));
  return [heading("Attention here, feed-forward there", "A mean step of each attention pool. Bubbles are the shares of it in which a side waits; exposed is what the step would be shorter by if bytes crossed in no time."),
    element("div", { class: "scroll", style: "margin-bottom:14px" }, element("table", {}, element("thead", {}, element("tr", {}, element("th", {}, "pools"), element("th", { class: "text" }, "A:F"),
      ["step", "attention busy", "its bubbles", "FFN busy", "its bubbles", "crosses a step", "a token", "hops exposed", "of the step"].map((text) => element("th", {}, text)), element("th", { class: "text" }, "waits for"))),
      element("tbody", {}, rows))), ...losses];
}

function detailText(detail) {
  return Object.entries(detail).map(([name, value]) => {
    if (typeof value === "string") return `${name.replaceAll("_", " ")} ${value}`;
    if (name.endsWith("_seconds")) return `${name.slice(0, -8).replaceAll("_", " ")} ${show("seconds", value)}`;
    if (name === "bytes" || name.endsWith("_bytes")) return `${name.replace(/_?bytes$/, "").replaceAll("_", " ")} ${show("bytes", value)}`.trim();
    return `${digits(value, 6)} ${name.replace(/^num_/, "").replaceAll("_", " ")}`;
  }).join(" · ");
}

function drawBars(waterfall) {
  const total = waterfall.total_seconds || 1e-9;
  const workers = [...new Set(waterfall.stages.map((stage) => stage.worker).filter(Boolean))].sort();
  const tint = (worker) => worker === null ? "var(--faint)" : `var(${stagePalette[workers.indexOf(worker) % stagePalette.length]})`;
  const bars = element("div", { class: "bars" });
  for (const stage of waterfall.stages) {
    const label = `${stage.name}: ${show("seconds", stage.seconds)}, from ${show("seconds", stage.start_seconds)}`;
    const detail = detailText(stage.detail || {});
    bars.append(element("div", { class: "stage" }, element("div", { class: "what" }, stage.name, element("small", {}, stage.worker || "")),
      element("div", { class: "track", title: label }, element("div", { class: "bar", style: `left:${(100 * stage.start_seconds / total).toFixed(3)}%;width:${(100 * stage.seconds / total).toFixed(3)}%;background:${tint(stage.worker)}` })),
      element("div", { class: "took" }, `${show("seconds", stage.seconds)} · ${show("share", stage.seconds / total, 2)}`),
      detail ? element("div", { class: "more" }, detail) : null));
  }
  bars.append(element("div", { class: "stage" }, element("div", { class: "scale" }, [0, 0.25, 0.5, 0.75, 1].map((share) => element("span", {}, show("seconds", share * total))))));
  return bars;
}

function waterfalls(result) {
  if (!result.waterfalls.length) return null;
  const shown = element("div", { class: "panel", "data-chart": "waterfall" });
  const draw = (index) => {
    const w = result.waterfalls[index];
    shown.replaceChildren(element("p", { class: "decision" }, `${w.num_prompt_tokens.toLocaleString("en-US")} prompt tokens (${w.num_cached_tokens.toLocaleString("en-US")} cached), ${w.num_outputs} output tokens, ${show("seconds", w.total_seconds)}, ${w.state}. ${w.decision}`), drawBars(w));
  };
  const select = element("select", { "aria-label": "which request", onchange: () => draw(Number(select.value)) }, result.waterfalls.map((w, k) => element("option", { value: k },
    `request ${w.request}: ${show("seconds", w.total_seconds)}, ${w.num_prompt_tokens} → ${w.num_outputs} tokens${w.epoch ? `, begun anew ${w.epoch}×` : ""}`)));
  draw(0);
  return [heading("Where a request's time went", "Stages follow each other without gap; a colour is a worker."), element("div", { class: "controls" }, select), shown];
}

function rests(result) {
  const parts = [];
  const classes = Object.entries(result.classes).sort((a, b) => b[1] - a[1]);
  if (classes.length) parts.push(element("div", { class: "panel" }, element("h3", {}, "The numbers it rests on, by class"),
    element("div", { class: "stack" }, classes.map(([, count], k) => element("i", { style: `flex:${count};background:${color(k)}` }))),
    element("div", { class: "legend", style: "margin:0" }, classes.map(([name, count], k) => element("span", { class: "key" }, element("i", { class: "swatch", style: `background:${color(k)}` }), `${count} ${name}`)))));
  const ranges = [["TTFT", result.ttft_interval], ["TPOT", result.tpot_interval]].filter(([, range]) => range);
  if (ranges.length) parts.push(element("div", { class: "panel" }, element("h3", {}, "How far off it may be"), element("ul", {},
    ranges.map(([name, range]) => element("li", {}, `${name}: × ${digits(range.low, 3)} to × ${digits(range.high, 3)}. ${range.basis}`)))));
  const list = (title, lines) => lines.length && parts.push(element("div", { class: "panel" }, element("h3", {}, title), element("ul", {}, lines.map((line) => element("li", {}, line)))));
  list("Assumed by the user", result.assumptions);
  list("To know before believing it", [...result.notes, ...(result.cost?.unknown || [])]);
  list("Faults that were played", result.faults.map((fault) => fault.text));
  return parts.length ? [heading("What it rests on"), element("div", { class: "grid wide" }, parts)] : null;
}

function provenance(result) {
  const m = result.machine;
  const facts = [["result", result.simulated ? "simulated: computed, not measured" : "measured"], ["bottleneck", result.bottleneck], ["model", result.model], ["workload", `${result.workload}, seed ${result.seed}`],
    [result.simulated ? "computed on" : "measured on", m && `${m.cpu}, ${m.num_cores} cores${m.core_quota ? ` (quota ${m.core_quota})` : ""}, ${show("bytes", m.memory_bytes)}${m.gpus.length ? `, ${m.gpus.join(", ")}` : ""}, ${m.os}${m.load_average === null ? "" : `, load ${m.load_average}`}`],
    ["took", result.cpu_seconds ? `${show("seconds", result.cpu_seconds)} of one core` : null], ["begun", result.started_at], ["versions", Object.entries(result.versions).map(([name, version]) => `${name} ${version}`).join(", ")],
    ["command", result.command.join(" ")]].filter(([, value]) => value);
  return [heading("Provenance"), element("div", { class: "panel" }, element("dl", {}, facts.map(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    result.was_interrupted ? element("p", { class: "warning" }, "The run was stopped before its end.") : null,
    result.deployment ? element("details", {}, element("summary", {}, "the deployment"), element("pre", {}, result.deployment)) : null)];
}

function details() {
  const holder = element("div");
  const draw = () => { holder.replaceChildren(...[pools, links, splits, waterfalls, rests, provenance].map((part) => part(RESULTS[stateOf.chosen])).filter(Boolean).flat(3)); fitAll(); };
  draw();
  if (RESULTS.length === 1) return holder;
  const select = element("select", { "aria-label": "which result", onchange: () => { stateOf.chosen = Number(select.value); draw(); } },
    RESULTS.map((result, k) => element("option", { value: k }, `${result.label}${result.simulated ? " (simulated)" : " (measured)"}`)));
  return [heading("One result in detail"), element("div", { class: "controls" }, select), holder];
}

function build() {
  const parts = [head(), sweeps(), RESULTS.length === 1 ? tiles(RESULTS[0]) : comparison(), latencies(), details(),
    element("footer", {}, `Made by transload ${DATA.version}. This page loads nothing from anywhere.`)];
  PAGE.append(...parts.filter(Boolean).flat(3).filter(Boolean));
  fitAll();
  document.documentElement.dataset.ready = "true";
}

try { build(); } catch (problem) {
  PAGE.append(element("p", { class: "warning" }, `This page could not be drawn: ${problem}`));
  throw problem;
}
