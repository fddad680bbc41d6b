// The page's one script: asks /v1/ every second and draws what it says. It decides nothing, and every text from
// outside reaches the document as a text node, never as markup.
"use strict";

const POLL_MS = 1000;
const ANSWER_MS = 5000;       // longer than this and the service counts as unreachable
const PAGE_NODES = 200;       // nodes asked for and drawn at once
const MAX_ROWS = 300;         // pods drawn at once; the filter narrows
const MANY_PODS = 3000;       // above this, held pods are asked for every tenth poll only
const SWEEP_MS = 15000;       // how often a filter walks all pages of a large cluster
const SILENT_SECONDS = 30;    // a report older than this is pointed out
const SAMPLES = 120;          // points of the small curves
const MOMENTS = 1200;         // of what it costs; when there are more, every other one is forgotten
const PHASES = ["waiting", "proposed", "assumed", "held", "leaving"];

const TAKEN = ["assumed", "held", "leaving"];

const $ = (id) => document.getElementById(id);

const seen = {
  cluster: null, nodes: [], pods: [], answeredAt: 0, failedSince: 0, error: "", polls: 0,
  pagesBefore: [], after: null, sweep: null, history: { gpus: [], units: [] }, pod: null, node: null,
  costs: null, moments: [],
};
const choice = {
  words: [], phase: "", view: "map",
  nodeSort: { key: "name", down: false }, podSort: { key: "phase", down: false },
};

// ------------------------------------------------------------------------------------------------ building blocks

/** An element with properties and children; strings become text nodes. */
function h(tag, props, ...children) {
  const el = document.createElement(tag);
  for (const [key, value] of Object.entries(props || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "class") el.className = value;
    else if (key === "style") for (const [name, v] of Object.entries(value)) el.style.setProperty(name, v);
    else if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
    else el.setAttribute(key, value === true ? "" : value);
  }
  el.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return el;
}

/** The same of SVG. */
function svg(tag, props, ...children) {
  const el = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(props || {})) el.setAttribute(key, value);
  el.append(...children);
  return el;
}

/** Make `parent` show exactly `items`, reusing each item's element while its signature stays the same. */
function keyed(parent, items, keyOf, signatureOf, make) {
  const old = parent.__children || new Map();
  const now = new Map();
  const focused = parent.contains(document.activeElement) ? document.activeElement : null;
  let focusKey = null;
  if (focused) {
    const mark = focused.closest("[data-key]");
    focusKey = mark ? [mark.dataset.key, focused.dataset.part || ""] : null;
  }
  let cursor = parent.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    const signature = signatureOf(item);
    let entry = old.get(key);
    if (!entry || entry.signature !== signature) {
      const el = make(item);
      el.dataset.key = key;
      if (entry) {
        if (cursor === entry.el) cursor = el;
        entry.el.replaceWith(el);
      }
      entry = { el, signature };
    }
    now.set(key, entry);
    if (entry.el === cursor) cursor = cursor.nextElementSibling;
    else parent.insertBefore(entry.el, cursor);
  }
  for (const [key, entry] of old) if (!now.has(key)) entry.el.remove();
  parent.__children = now;
  if (focusKey && document.activeElement !== focused) {
    const entry = now.get(focusKey[0]);
    const target = entry && (focusKey[1] ? entry.el.querySelector(`[data-part="${focusKey[1]}"]`) : entry.el);
    if (target) target.focus({ preventScroll: true });
  }
}

function text(el, words) {
  if (el.textContent !== words) el.textContent = words;
}

function plural(n, one, many) {
  return `${n.toLocaleString("en")} ${n === 1 ? one : many || one + "s"}`;
}

function ago(seconds) {
  if (seconds === null || seconds === undefined) return "never";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return `${Math.round(seconds / 3600)} h`;
}

const compare = new Intl.Collator("en", { numeric: true }).compare;
const sharesOf = (gpu) => gpu.shares || [];
const strays = (node) => node.not_in_inventory || [];
const podName = (pod) => `${pod.namespace}/${pod.name}`;
const route = (what, id, more) => "#" + new URLSearchParams({ [what]: id, ...more });

// ---------------------------------------------------------------------------------------- what a node or pod says

/** How many compute slices a profile has, as its name says it: "3g.40gb" → 3. Only for colour and label. */
function computeSlices(profile) {
  const match = /^(\d+)g/.exec(profile);
  return match ? Number(match[1]) : 0;
}

function shade(profile) {
  const n = computeSlices(profile);
  return n >= 7 ? "s7" : n >= 4 ? "s4" : n >= 1 ? `s${n}` : "s0";
}

/** What is free on a node: whole GPUs and MIG units, out of how many. A proposal takes nothing yet. */
function room(node) {
  const sum = { gpus: 0, freeGpus: 0, units: 0, freeUnits: 0, shared: 0, freeMilli: 0 };
  for (const gpu of node.gpus) {
    if (gpu.mig) {
      const taken = gpu.slices.filter((s) => TAKEN.includes(s.phase)).reduce((n, s) => n + s.size, 0);
      sum.units += gpu.width;
      if (gpu.phase !== "withheld") sum.freeUnits += Math.max(0, gpu.width - taken);
    } else {
      sum.gpus += 1;
      if (gpu.phase === "free" || gpu.phase === "proposed") sum.freeGpus += 1;
      if (gpu.phase === "shared") {
        sum.shared += 1;
        sum.freeMilli += Math.max(0, 1000 - takenMilli(gpu));
      }
    }
  }
  return sum;
}

const takenMilli = (gpu) => sharesOf(gpu).filter((s) => TAKEN.includes(s.phase)).reduce((n, s) => n + s.milli, 0);

function roomWords(node) {
  const r = room(node);
  const parts = [];
  if (r.gpus) parts.push(`${r.freeGpus} of ${plural(r.gpus, "GPU")} free`);
  if (r.shared) parts.push(`${r.freeMilli} milli free on ${plural(r.shared, "shared GPU")}`);
  if (r.units) parts.push(`${r.freeUnits} of ${r.units} MIG units free`);
  return parts.join(", ") || "no GPUs";
}

function gpuWords(gpu) {
  const what = gpu.mig ? `GPU ${gpu.index}, MIG` : `GPU ${gpu.index}`;
  const who = gpu.pod ? ` by ${podName(gpu.pod)}` : "";
  const slices = [...gpu.slices.map((s) => sliceWords(s)), ...sharesOf(gpu).map((s) => shareWords(gpu, s))].join("; ");
  return `${what}: ${gpu.phase}${who}${gpu.reason ? ` (${gpu.reason})` : ""}${slices ? `: ${slices}` : ""}`;
}

function sliceWords(slice) {
  const who = slice.pod ? ` by ${podName(slice.pod)}` : "";
  return `${slice.profile} at ${slice.start} ${slice.phase}${who}${notMade(slice)}`;
}

function shareWords(gpu, share) {
  return `${share.milli} milli of GPU ${gpu.index} ${share.phase} by ${podName(share.pod)}`;
}

/** Without Kubernetes nobody makes slices, so there is nothing to say. */
function notMade(slice) {
  return slice.exists || seen.cluster.mode !== "kubernetes" ? "" : ", not made yet";
}

function nodeHaystack(node) {
  const words = [node.name, node.product, node.reason, node.offered ? "offered" : "not offered", node.driver];
  for (const gpu of node.gpus) {
    words.push(gpu.uuid, gpu.phase, gpu.reason, gpu.pod ? podName(gpu.pod) : "");
    for (const s of gpu.slices) words.push(s.profile, s.phase, s.pod ? podName(s.pod) : "");
    for (const s of sharesOf(gpu)) words.push(`${s.milli} milli`, s.phase, podName(s.pod));
  }
  return words.join(" ").toLowerCase();
}

function podHaystack(pod) {
  return [podName(pod), pod.uid, pod.phase, pod.demand, pod.node, pod.reason, ...(pod.devices || [])].join(" ").toLowerCase();
}

/** Everything of a node that is drawn; the age of its report is not, or each card would change every second. */
function nodeSignature(node) {
  return JSON.stringify([node.name, node.offered, node.reason, node.product, isSilent(node), node.gpus, strays(node), node.orders, node.slices, { ...node.handing, counts: null }]);
}

const isSilent = (node) => (node.reported_seconds_ago ?? 0) > SILENT_SECONDS;

const haystacks = new WeakMap();
function matches(item, haystackOf) {
  if (!choice.words.length) return true;
  let hay = haystacks.get(item);
  if (hay === undefined) haystacks.set(item, (hay = haystackOf(item)));
  return choice.words.every((word) => hay.includes(word));
}

// ------------------------------------------------------------------------------------------------------ drawing

function drawGpu(gpu, large) {
  if (gpu.mig && gpu.phase !== "withheld") {
    const slices = gpu.slices.map((s) => h("span", {
      class: `slice ${shade(s.profile)} ${s.phase}`, title: sliceWords(s), "data-uid": s.pod ? s.pod.uid : null,
      style: { left: `${(100 * s.start) / gpu.width}%`, width: `calc(${(100 * s.size) / gpu.width}% - 1px)` },
    }, large ? s.profile : String(computeSlices(s.profile) || "")));
    return h("div", { class: "gpu mig", style: { "--width": gpu.width }, title: slices.length ? null : gpuWords(gpu) }, slices);
  }
  if (sharesOf(gpu).length && gpu.phase !== "withheld") {
    let left = 0;
    const shares = sharesOf(gpu).map((s) => {
      const at = left;
      left += s.milli;
      return h("span", { class: `slice s0 ${s.phase}`, title: shareWords(gpu, s), "data-uid": s.pod.uid,
        style: { left: `${at / 10}%`, width: `calc(${s.milli / 10}% - 1px)` } }, large ? `${s.milli} milli` : String(s.milli));
    });
    return h("div", { class: "gpu shared", title: gpuWords(gpu) }, shares);
  }
  const label = gpu.phase === "free" ? "free" : gpu.phase === "withheld" ? "withheld" : gpu.pod ? gpu.pod.name : gpu.phase;
  return h("div", { class: `gpu ${gpu.phase}`, title: gpuWords(gpu), "data-uid": gpu.pod ? gpu.pod.uid : null },
    h("span", { class: "name" }, large && gpu.pod ? podName(gpu.pod) : label));
}

function drawCard(node) {
  const r = room(node);
  const parts = [[r.freeGpus, r.gpus], [r.freeUnits, r.units]].filter(([, all]) => all);
  const roomShort = parts.flatMap(([free, all], i) => [i ? " · " : "", h("b", {}, String(free)), `/${all}`]);
  const why = !node.offered ? `not offered: ${node.reason || "no reason given"}` : isSilent(node) ? "its agent is silent" : node.reason;
  const tiles = node.gpus.map((gpu) => {
    const tile = drawGpu(gpu, false);
    tile.dataset.gpu = gpu.uuid;
    return tile;
  });
  return h("li", { class: `node${node.offered ? "" : " off"}` },
    h("div", { class: "node-head" },
      h("a", { href: route("node", node.name), tabindex: "-1", "data-part": "open", title: node.name,
        "aria-label": `${node.name}, ${node.product}, ${roomWords(node)}${node.offered ? "" : ", not offered"}` }, node.name),
      h("span", { class: "product", title: node.product }, shortProduct(node)),
      h("span", { class: "room", title: roomWords(node) }, ...roomShort, " free")),
    why ? h("p", { class: "why" }, why) : null,
    h("div", { class: "gpus", "aria-hidden": "true" }, tiles));
}

function shortProduct(node) {
  return `${node.gpus.length} × ${node.product.replace(/^(NVIDIA|Tesla)\s+/, "")}`;
}

const NODE_COLUMNS = [
  { key: "name", title: "Node", of: (n) => n.name, draw: (n) => h("a", { href: route("node", n.name), "data-part": "open" }, n.name) },
  { key: "product", title: "GPUs", of: (n) => n.product, draw: (n) => shortProduct(n) },
  { key: "offered", title: "Offered", of: (n) => (n.offered ? "yes" : `no ${n.reason}`),
    draw: (n) => (n.offered ? "yes" : h("span", { class: "tag off" }, `✕ ${n.reason || "no"}`)) },
  { key: "gpus", title: "GPUs free", number: true, of: (n) => room(n).freeGpus, draw: (n) => outOf(room(n).freeGpus, room(n).gpus) },
  { key: "units", title: "MIG units free", number: true, of: (n) => room(n).freeUnits, draw: (n) => outOf(room(n).freeUnits, room(n).units) },
  { key: "pods", title: "Pods", number: true, of: podsOn, draw: (n) => String(podsOn(n)) },
  { key: "driver", title: "Driver", wide: true, of: (n) => n.driver, draw: (n) => n.driver },
];

const POD_COLUMNS = [
  { key: "name", title: "Pod", of: podName, kind: "pod", draw: (p) => [h("small", { class: "ns" }, `${p.namespace}/`),
    h("a", { href: route("pod", p.uid), "data-part": "open", title: podName(p) }, p.name)] },
  { key: "demand", title: "Asks", of: (p) => p.demand, draw: (p) => p.demand, nowrap: true },
  { key: "phase", title: "Phase", of: (p) => String(PHASES.indexOf(p.phase)), draw: (p) => phaseTag(p.phase) },
  { key: "node", title: "Node", kind: "on", of: (p) => p.node || "", draw: (p) => (p.node ? h("a", { href: route("node", p.node), "data-part": "node", title: p.node }, p.node) : "–") },
  { key: "since", title: "For", number: true, of: (p) => p.since_seconds || 0, draw: () => h("span", { "data-since": "" }) },
];

const outOf = (n, all) => (all ? `${n} of ${all}` : "–");

function podsOn(node) {
  const uids = new Set();
  for (const gpu of node.gpus) for (const part of [gpu, ...gpu.slices, ...sharesOf(gpu)]) if (part.pod) uids.add(part.pod.uid);
  return uids.size;
}

function phaseTag(phase) {
  return h("span", { class: `tag ${phase === "waiting" ? "waiting" : ""}` }, h("i", { class: `key ${phase}`, "aria-hidden": "true" }), phase);
}

function cell(column, item) {
  const kind = [column.kind || "", column.number ? "number" : "", column.wide ? "wide" : "", column.nowrap ? "nowrap" : ""].join(" ").trim();
  return h("td", { class: kind || null }, column.draw(item));
}

function sortBy(items, columns, sort, tie) {
  const column = columns.find((c) => c.key === sort.key);
  const sign = sort.down ? -1 : 1;
  return items.slice().sort((a, b) => {
    const [x, y] = [column.of(a), column.of(b)];
    return sign * (typeof x === "number" ? x - y : compare(x, y)) || compare(tie(a), tie(b));
  });
}

function makeHead(table, columns, sort) {
  const row = table.tHead.rows[0];
  for (const column of columns) {
    const press = () => {
      if (sort.key === column.key) sort.down = !sort.down;
      else Object.assign(sort, { key: column.key, down: Boolean(column.number) });
      draw();
    };
    row.append(h("th", { scope: "col", class: [column.number ? "number" : "", column.wide ? "wide" : ""].join(" ").trim() || null,
      "data-sort": column.key }, h("button", { type: "button", onclick: press }, column.title)));
  }
}

function markSort(table, sort) {
  for (const th of table.tHead.rows[0].cells) {
    if (th.dataset.sort !== sort.key) th.removeAttribute("aria-sort");
    else th.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
  }
}

function visibleNodes() {
  const all = choice.words.length && seen.sweep ? seen.sweep.nodes : seen.nodes;
  return all.filter((node) => matches(node, nodeHaystack));
}

function drawNodes() {
  const found = visibleNodes();
  const shown = sortBy(found, NODE_COLUMNS, choice.nodeSort, (n) => n.name).slice(0, PAGE_NODES);
  if (choice.view === "map") {
    keyed($("map"), shown, (n) => n.name, nodeSignature, drawCard);
    roveTo($("map").querySelector("a[tabindex='0']") || $("map").querySelector(".node a"), false);
  } else {
    const table = $("node-table");
    markSort(table, choice.nodeSort);
    keyed(table.tBodies[0], shown, (n) => n.name, nodeSignature,
      (n) => h("tr", {}, NODE_COLUMNS.map((column) => cell(column, n))));
  }
  const none = !shown.length && seen.cluster;
  $("no-nodes").hidden = !none;
  if (none) text($("no-nodes"), choice.words.length ? "No node matches the filter." : "No node has reported yet. Agents report to /v1/reports.");
  $("node-table-box").classList.toggle("hidden", !shown.length);
  const paged = !choice.words.length && (seen.pagesBefore.length || (seen.cluster && seen.cluster.next));
  $("pages").hidden = !paged;
  if (paged) {
    const first = seen.pagesBefore.length * PAGE_NODES;
    $("previous").disabled = !seen.pagesBefore.length;
    $("next").disabled = !seen.cluster.next;
    text($("page-words"), `nodes ${first + 1} to ${first + seen.nodes.length} of ${seen.cluster.totals.nodes.toLocaleString("en")}`);
  }
  return found.length;
}

function drawPods() {
  const counts = Object.fromEntries(PHASES.map((phase) => [phase, 0]));
  for (const pod of seen.pods) counts[pod.phase] = (counts[pod.phase] || 0) + 1;
  drawPhases(counts);
  const namespaces = new Set(seen.pods.map((pod) => pod.namespace));
  document.body.classList.toggle("one-namespace", namespaces.size < 2);
  const found = seen.pods.filter((pod) => (!choice.phase || pod.phase === choice.phase) && matches(pod, podHaystack));
  const shown = sortBy(found, POD_COLUMNS, choice.podSort, podName).slice(0, MAX_ROWS);
  const table = $("pod-table");
  markSort(table, choice.podSort);
  keyed(table.tBodies[0], shown, (p) => p.uid, (p) => JSON.stringify([p.namespace, p.name, p.phase, p.demand, p.node]),
    (p) => h("tr", {}, POD_COLUMNS.map((column) => cell(column, p))));
  const rows = table.tBodies[0].__children;
  for (const pod of shown) text(rows.get(pod.uid).el.querySelector("[data-since]"), ago(pod.since_seconds));
  const words = !seen.cluster ? "" : found.length > shown.length
    ? `These are ${shown.length} of ${plural(found.length, "pod")}; filter to narrow.`
    : found.length ? "" : choice.words.length || choice.phase ? "No pod matches." : "No pod has asked yet.";
  $("no-pods").hidden = !words;
  text($("no-pods"), words);
  table.classList.toggle("hidden", !shown.length);
  drawWaiting();
  return found.length;
}

function drawPhases(counts) {
  const choices = [["", `all ${seen.pods.length.toLocaleString("en")}`], ...PHASES.map((p) => [p, `${p} ${counts[p].toLocaleString("en")}`])];
  const box = $("phases");
  if (box.querySelectorAll("input").length !== choices.length) {
    for (const [phase] of choices) {
      const pick = () => { choice.phase = phase; draw(); };
      box.append(h("label", {}, h("input", { type: "radio", name: "phase", value: phase, checked: phase === choice.phase, onchange: pick }), h("span", {})));
    }
  }
  box.querySelectorAll("span").forEach((span, i) => text(span, choices[i][1]));
}

/** Pods that wait for the same thing are one line, with the reason of the first: reasons differ in small print only. */
function drawWaiting() {
  const groups = new Map();
  for (const pod of seen.pods) {
    if (pod.phase !== "waiting") continue;
    if (!groups.has(pod.demand)) groups.set(pod.demand, { key: pod.demand, demand: pod.demand, reason: pod.reason, pods: [] });
    groups.get(pod.demand).pods.push(pod);
  }
  const lines = [...groups.values()].sort((a, b) => b.pods.length - a.pods.length || compare(a.key, b.key));
  $("waiting").hidden = !lines.length;
  keyed($("waiting-list"), lines.slice(0, 12), (g) => g.key, (g) => JSON.stringify([g.reason, g.pods.map((p) => p.uid)]), (g) => {
    const first = g.pods[0];
    return h("li", {}, h("p", {}, h("b", {}, plural(g.pods.length, "pod")), ` ${g.pods.length === 1 ? "asks" : "ask"} for ${g.demand}: `,
      h("a", { href: route("pod", first.uid), "data-part": "open" }, g.pods.length > 1 ? `${first.name} and ${g.pods.length - 1} more` : first.name)),
    h("p", { class: "why-not", title: g.reason }, g.reason || "no reason given yet"));
  });
}

const FIGURES = [
  { key: "gpus", title: "Whole GPUs held", kind: "of-gpus", curve: "gpus", of: (t) => [t.gpus_held, t.gpus - t.mig_gpus],
    note: (t) => (t.gpus_shared ? `${plural(t.shares_held, "share")} on ${plural(t.gpus_shared, "more GPU", "more GPUs")}` : "none is shared") },
  { key: "units", title: "MIG units held", kind: "of-units", curve: "units", of: (t) => [t.mig_units_held, t.mig_units],
    note: (t) => `${plural(t.slices_held, "slice")} on ${plural(t.mig_gpus, "GPU")}` },
  { key: "nodes", title: "Nodes offered", of: (t) => [t.nodes_offered, t.nodes],
    note: (t) => (t.nodes_offered < t.nodes ? `${t.nodes - t.nodes_offered} not offered` : "every node reports") },
  { key: "pods", title: "Pods held", of: (t) => [t.pods_held, null],
    note: (t) => `${t.pods_proposed} proposed · ${t.pods_assumed} assumed · ${t.pods_leaving} leaving` },
  { key: "waiting", title: "Pods waiting", of: (t) => [t.pods_waiting, null], alarm: (t) => t.pods_waiting > 0,
    note: (t) => (t.pods_waiting ? "each says why" : "nobody waits") },
];

function drawFigures(totals) {
  const box = $("figures");
  if (!box.childElementCount) {
    for (const f of FIGURES) {
      box.append(h("div", { class: `figure ${f.kind || ""}`, id: `figure-${f.key}` }, h("dt", {}, f.title),
        h("dd", {}, h("span", { class: "value" }), h("small", {})), f.curve ? curve() : null,
        f.curve ? h("div", { class: "bar" }, h("i")) : null, f.note ? h("p", { class: "note" }) : null));
    }
  }
  for (const f of FIGURES) {
    const el = $(`figure-${f.key}`);
    const [value, all] = f.of(totals);
    text(el.querySelector(".value"), value.toLocaleString("en"));
    text(el.querySelector("small"), all === null ? "" : `of ${all.toLocaleString("en")}${f.curve && all ? ` · ${Math.round((100 * value) / all)} %` : ""}`);
    if (f.curve) {
      el.querySelector(".bar i").style.width = `${all ? (100 * value) / all : 0}%`;
      el.querySelector("polyline").setAttribute("points", seen.history[f.curve].map((y, i, all) => `${SAMPLES - all.length + i},${(24 - 22 * y).toFixed(1)}`).join(" "));
    }
    if (f.note) text(el.querySelector(".note"), f.note(totals));
    el.classList.toggle("alarm", Boolean(f.alarm && f.alarm(totals)));
  }
}

function curve() {
  return svg("svg", { viewBox: `0 0 ${SAMPLES} 26`, preserveAspectRatio: "none", "aria-hidden": "true" }, svg("polyline"));
}

function remember(totals) {
  const add = (list, value, all) => { list.push(all ? value / all : 0); if (list.length > SAMPLES) list.shift(); };
  add(seen.history.gpus, totals.gpus_held, totals.gpus - totals.mig_gpus);
  add(seen.history.units, totals.mig_units_held, totals.mig_units);
}

// ---------------------------------------------------------------------------------------------- what it costs

const mib = (number) => (number === null ? "–" : `${number.toLocaleString("en", { maximumFractionDigits: number < 10 ? 1 : 0 })} MiB`);
const often = (perSecond) => perSecond.toLocaleString("en", { maximumFractionDigits: perSecond < 10 ? 2 : 0 });

/** A short time, to about two digits. */
function brief(seconds) {
  if (seconds === null) return "–";
  const ms = 1000 * seconds;
  return seconds >= 1 ? `${seconds.toFixed(1)} s` : `${ms.toFixed(ms < 1 ? 2 : ms < 10 ? 1 : 0)} ms`;
}

const COST_COLUMNS = [
  { title: "Answers", of: (v) => v.answers.toLocaleString("en") },
  { title: "p50", of: (v) => brief(v.p50_seconds) },
  { title: "p99", of: (v) => brief(v.p99_seconds) },
  { title: "Per second, lately", of: (v) => often(v.lately.per_second) },
  { title: "p50, lately", of: (v) => brief(v.lately.p50_seconds) },
  { title: "p99, lately", of: (v) => brief(v.lately.p99_seconds) },
];

const COST_MACHINE = [
  ["Longest block", (c) => `${brief(c.loop.wall.longest_seconds)} since its start, ${brief(c.loop.wall.longest_lately_seconds)} lately`],
  ["… of its own work", (c) => `${brief(c.loop.own.longest_seconds)} since its start, ${brief(c.loop.own.longest_lately_seconds)} lately`],
  ["Over 20 ms", (c) => `${plural(c.loop.wall.over_20_ms, "look")} of ${c.loop.looks.toLocaleString("en")}, ${c.loop.own.over_20_ms.toLocaleString("en")} by its own work`],
  ["Memory of the service", (c) => mib(c.memory_mib.service)],
  ["Memory of the planning process", (c) => mib(c.memory_mib.planning)],
];

const COST_SIZES = [
  ["Nodes", (c) => `${c.sizes.nodes.toLocaleString("en")}, ${c.sizes.nodes_offered.toLocaleString("en")} of them offered`],
  ["Pods held", (c) => c.sizes.pods_held.toLocaleString("en")],
  ["Kinds of demand known", (c) => c.sizes.demands.toLocaleString("en")],
  ["Different node states", (c) => c.sizes.states.toLocaleString("en")],
  ["… of hosts", (c) => `${c.sizes.hosts.toLocaleString("en")} (nodes without their GPUs in MIG mode)`],
  ["… of GPUs in MIG mode", (c) => c.sizes.mig_gpus.toLocaleString("en")],
  ["Nodes looked at anew", (c) => `${c.rows.updated.toLocaleString("en")}, lately ${often(c.rows.per_second)} per second` +
    (c.rows.last_seconds_ago === null ? "" : `, the last ${ago(c.rows.last_seconds_ago)} ago`)],
];

const PLOTS = [
  { key: "filter", title: "Filter, lately", words: brief, least: 0.001, lines: [["p50", (m) => m.p50], ["p99", (m) => m.p99]] },
  { key: "memory", title: "Memory", words: mib, least: 1, lines: [["service", (m) => m.service], ["planning process", (m) => m.planning]] },
];

function rememberCosts(costs) {
  if (costs.missing) return;
  seen.costs = costs;
  const { p50_seconds: p50, p99_seconds: p99 } = costs.verbs.filter.lately;
  seen.moments.push({ at: Date.now(), p50, p99, ...costs.memory_mib });
  if (seen.moments.length > MOMENTS) seen.moments = seen.moments.filter((_, i) => i % 2 === 1);
}

function drawCosts() {
  const costs = seen.costs;
  $("no-costs").hidden = Boolean(costs);
  $("costs-body").hidden = !costs;
  if (!costs) return;
  text($("costs-since"), `since its start ${ago(costs.up_seconds)} ago; lately: the last ${Math.round(costs.lately_seconds)} s`);
  drawCostTable(costs.verbs);
  drawFacts($("cost-machine"), COST_MACHINE, costs);
  drawFacts($("cost-sizes"), COST_SIZES, costs);
  PLOTS.forEach(drawPlot);
}

function drawCostTable(verbs) {
  const table = $("cost-table");
  if (!table.tHead.rows[0].childElementCount) {
    table.tHead.rows[0].append(h("th", { scope: "col" }, "Call"),
      ...COST_COLUMNS.map((column) => h("th", { scope: "col", class: "number" }, column.title)));
  }
  keyed(table.tBodies[0], Object.entries(verbs), ([verb]) => verb, ([, said]) => JSON.stringify(said),
    ([verb, said]) => h("tr", {}, h("th", { scope: "row" }, verb), COST_COLUMNS.map((column) => h("td", { class: "number" }, column.of(said)))));
}

function drawFacts(list, lines, costs) {
  if (!list.childElementCount) list.append(...lines.flatMap(([title]) => [h("dt", {}, title), h("dd", {})]));
  list.querySelectorAll("dd").forEach((dd, i) => text(dd, lines[i][1](costs)));
}

/** Lines over time, from 0 to the most that was seen; where nothing is known there is a gap. */
function drawPlot(plot) {
  const el = $(`plot-${plot.key}`) || makePlot(plot);
  const moments = seen.moments;
  const [first, last] = [moments[0].at, moments.at(-1).at];
  const most = Math.max(plot.least, ...moments.flatMap((m) => plot.lines.map(([, of]) => of(m) ?? 0)));
  const x = (m) => (last > first ? (1000 * (m.at - first)) / (last - first) : 1000);
  plot.lines.forEach(([, of], i) => {
    el.querySelector(`.box .line-${i}`).setAttribute("d", pathOf(moments.map((m) => [x(m), of(m)]), (y) => 100 - (96 * y) / most));
  });
  const now = plot.lines.map(([name, of]) => `${name} ${plot.words(of(moments.at(-1)))}`);
  el.querySelectorAll(".names b").forEach((b, i) => text(b, now[i]));
  const span = last > first ? `${ago((last - first) / 1000)}, since this page was opened` : "this page was just opened";
  text(el.querySelector(".scale"), `0 to ${plot.words(most)}`);
  text(el.querySelector(".span"), span);
  el.querySelector(".box").setAttribute("aria-label", `${plot.title}: ${now.join(", ")}; 0 to ${plot.words(most)}; ${span}`);
}

function makePlot(plot) {
  const line = (i) => svg("path", { class: `line-${i}`, d: "M0 5 L36 5" });
  const names = plot.lines.map((_, i) => h("span", {}, svg("svg", { viewBox: "0 0 36 10", "aria-hidden": "true" }, line(i)), h("b", {})));
  const box = svg("svg", { class: "box", viewBox: "0 0 1000 100", preserveAspectRatio: "none", role: "img" },
    ...plot.lines.map((_, i) => svg("path", { class: `line-${i}` })));
  const el = h("figure", { class: "plot", id: `plot-${plot.key}` }, h("figcaption", {}, plot.title), h("p", { class: "names" }, names), box,
    h("p", {}, h("span", { class: "scale" }), h("span", { class: "span" })));
  $("plots").append(el);
  return el;
}

function pathOf(points, y) {
  let inLine = false;
  const parts = [];
  for (const [x, value] of points) {
    const known = value !== null && value !== undefined;
    if (known) {
      const at = `${x.toFixed(1)} ${y(value).toFixed(1)}`;
      parts.push(inLine ? `L${at}` : `M${at} L${at}`); // a lonely point is a dot
    }
    inLine = known;
  }
  return parts.join(" ");
}

// -------------------------------------------------------------------------------------------- how it all stands

/** Whether what is shown is true now: live, waiting (the service is not ready) or unreachable. */
function drawState() {
  const now = Date.now();
  const lost = Boolean(seen.failedSince);
  const kind = lost ? "unreachable" : !seen.cluster ? "starting" : seen.cluster.ready ? "live" : "waiting";
  const words = { starting: "asking the service …", live: `live · ${seen.cluster ? seen.cluster.mode : ""}`, waiting: "not ready", unreachable: "unreachable" };
  $("state").dataset.state = kind;
  text($("state-words"), words[kind]);
  document.body.classList.toggle("dim", lost);
  text($("age"), seen.answeredAt ? `updated ${ago((now - seen.answeredAt) / 1000)} ago` : "");
  const banner = $("banner");
  let say = "";
  if (lost) {
    const since = seen.answeredAt ? `; below is what was known at ${new Date(seen.answeredAt).toLocaleTimeString()}` : "";
    say = `The service does not answer (${seen.error})${since}.`;
  } else if (seen.cluster && !seen.cluster.ready) {
    say = `Not ready, pods are refused until it is. Waiting for: ${(seen.cluster.waiting_for || []).join(", ") || "its start"}.`;
  }
  banner.hidden = !say;
  banner.dataset.tone = lost ? "bad" : "warn";
  text(banner, say);
  const warnings = (seen.cluster && seen.cluster.warnings) || [];
  $("warnings").hidden = !warnings.length;
  keyed($("warnings-list"), warnings.slice(0, 20), (w) => w, (w) => w, (w) => h("li", {}, w));
}

function draw() {
  drawState();
  if (!seen.cluster) return;
  drawFigures(seen.cluster.totals);
  const nodes = drawNodes();
  const pods = drawPods();
  if (choice.view === "costs") drawCosts();
  let words = choice.words.length ? `${plural(nodes, "node")}, ${plural(pods, "pod")} match` : "";
  if (choice.words.length && seen.sweep && !seen.sweep.done) words += `; searched ${seen.sweep.nodes.length.toLocaleString("en")} of ${seen.cluster.totals.nodes.toLocaleString("en")} nodes so far`;
  text($("found"), words);
  drawDetail();
}

// ------------------------------------------------------------------------------------------------------- detail

let opener = null;
let detailSignature = "";

function detailRoute() {
  const query = new URLSearchParams(location.hash.slice(1));
  if (query.has("pod")) return { pod: query.get("pod") };
  if (query.has("node")) return { node: query.get("node"), gpu: query.get("gpu") };
  return null;
}

function closeDetail() {
  if (detailRoute()) history.pushState(null, "", location.pathname + location.search);
  drawDetail();
}

/** To what opened the detail; it may have been drawn anew since. */
function giveFocusBack() {
  if (!opener) return;
  const again = opener.el.isConnected ? opener.el
    : opener.key && [...document.querySelectorAll("main [data-key]")].find((el) => el.dataset.key === opener.key)?.querySelector("a");
  (again || $("nodes")).focus({ preventScroll: true });
  opener = null;
}

function drawDetail() {
  const want = detailRoute();
  const dialog = $("detail");
  if (!want) {
    detailSignature = "";
    if (dialog.open) dialog.close();
    return;
  }
  const what = want.pod ? podDetail(want.pod) : nodeDetail(want.node, want.gpu);
  const signature = JSON.stringify([want, what.signature]);
  if (signature !== detailSignature) {
    const fresh = JSON.parse(detailSignature || "[null]")[0];
    const turned = JSON.stringify(fresh) !== JSON.stringify(want);
    detailSignature = signature;
    const key = dialog.contains(document.activeElement) ? document.activeElement.dataset.part : null;
    text($("detail-title"), what.title);
    $("detail-body").replaceChildren(...what.body().filter(Boolean));
    const back = key && [...dialog.querySelectorAll("[data-part]")].find((el) => el.dataset.part === key);
    if (!dialog.open) {
      const from = document.activeElement;
      opener = { el: from, key: from.closest("main [data-key]")?.dataset.key };
      dialog.showModal();
    }
    if (turned) {
      $("detail-title").focus({ preventScroll: true });
      const here = dialog.querySelector(".board.here");
      dialog.scrollTop = 0;
      if (here) here.scrollIntoView({ block: "nearest" });
    } else if (back) back.focus({ preventScroll: true });
  }
  for (const el of dialog.querySelectorAll("[data-age]")) text(el, what.age());
}

function facts(pairs) {
  return h("dl", { class: "facts" }, pairs.filter((pair) => pair && pair[1] !== "" && pair[1] !== null).map(([k, v]) => [h("dt", {}, k), h("dd", {}, v)]).flat());
}

function podLink(pod, part) {
  return h("a", { href: route("pod", pod.uid), "data-part": part }, podName(pod));
}

function nodeDetail(name, gpuUuid) {
  const node = seen.nodes.find((n) => n.name === name) || (seen.node && seen.node.name === name ? seen.node : null);
  if (!node) {
    const words = seen.node && seen.node.missing === name ? "The service does not know this node." : "asking the service …";
    return { title: name, signature: words, age: () => "", body: () => [h("p", { class: "words" }, words)] };
  }
  return {
    title: node.name,
    signature: nodeSignature(node),
    age: () => `${ago(node.reported_seconds_ago)} ago`,
    body: () => [
      node.offered ? null : h("p", { class: "words" }, `Not offered: ${node.reason || "no reason given"}.`),
      facts([["GPUs", shortProduct(node)], ["Free", roomWords(node)], ["Driver", node.driver], ["CUDA", node.cuda],
        ...versionFacts(node), ["Devices handed out", handingWords(node)],
        ["Reported", h("span", { "data-age": "" })], node.offered ? ["Offered", `yes${node.reason ? ` (${node.reason})` : ""}`] : null]),
      h("section", {}, h("h3", {}, "GPUs and slices"), node.gpus.map((gpu) => board(node, gpu, gpu.uuid === gpuUuid))),
      node.slices ? h("p", { class: "words" }, `Only slices that exist are given out: ${node.slices}.`) : null,
      orderWords(node).length ? h("section", {}, h("h3", {}, "Being changed by its agent"),
        h("ul", {}, orderWords(node).map((each) => h("li", { class: "mono" }, each)))) : null,
      handingOf(node).overlaps.length ? h("section", {}, h("h3", {}, "Had by more than one pod"),
        h("ul", {}, handingOf(node).overlaps.map((each) => h("li", {}, each)))) : null,
      handingOf(node).differ.length ? h("section", {}, h("h3", {}, "The kubelet counts other devices than containers have"),
        h("ul", {}, handingOf(node).differ.map((each) => h("li", {}, podLink(each.pod, each.container + each.resource), ` ${each.container}: has `,
          h("span", { class: "mono" }, each.devices.join(", ")), ", counted: ", h("span", { class: "mono" }, each.kubelet.join(", ")))))) : null,
      strays(node).length ? h("section", {}, h("h3", {}, "Held, but not in its report"), h("ul", {}, strays(node).map((each) => h("li", {},
        h("span", { class: "mono" }, each.device), " ", podLink(each.pod, each.device))))) : null,
    ],
  };
}

/** What its agent is told to make, remove and switch, and has not done yet. */
function orderWords(node) {
  const orders = node.orders || { make: [], remove: [], switch: [] };
  return [...orders.make.map((each) => `make ${each}`), ...orders.remove.map((each) => `remove ${each}`), ...orders.switch];
}

const handingOf = (node) => node.handing || { by: null, none: "", shares: "", differ: [], overlaps: [] };

/** How containers come by their devices there; without Kubernetes there are none. */
function handingWords(node) {
  const handing = handingOf(node);
  if (!handing.by && seen.cluster.mode !== "kubernetes") return "";
  const by = { plugin: "by Tangram's agent", observe: "by another device plugin; the ledger follows what it gives" }[handing.by]
    || "not by Tangram, and not seen: placements are advice";
  return [by, handing.none ? `not now: ${handing.none}` : "", handing.shares ? `shares: ${handing.shares}` : ""].filter(Boolean).join("; ");
}

/** The rest of the chain of versions; driver and CUDA have their own place. */
function versionFacts(node) {
  const names = { kernel: "Kernel", toolkit: "Toolkit", runtime: "Runtime", kubelet: "Kubelet" };
  const versions = node.versions || {};
  return Object.keys(names).filter((key) => versions[key]).map((key) => [names[key], versions[key]]);
}

function board(node, gpu, here) {
  const ruler = gpu.mig ? h("div", { class: "ruler", "aria-hidden": "true" }, Array.from({ length: gpu.width }, (_, i) => h("span", {}, String(i)))) : null;
  const rows = gpu.mig
    ? gpu.slices.slice().sort((a, b) => a.start - b.start).map((s) => h("li", {}, h("span", {}, h("span", { class: "mono" }, `${s.profile}@${s.start}`),
      ` ${s.phase}${notMade(s)}`, s.uuid ? h("span", { class: "mono" }, ` ${s.uuid}`) : null), s.pod ? podLink(s.pod, `${gpu.uuid}${s.start}`) : "nobody's"))
    : sharesOf(gpu).length ? sharesOf(gpu).map((s) => h("li", {}, h("span", {}, h("span", { class: "mono" }, `${s.milli} milli`), ` ${s.phase}`),
      podLink(s.pod, `${gpu.uuid}${s.pod.uid}`)))
    : gpu.pod ? [h("li", {}, h("span", {}, gpu.phase), podLink(gpu.pod, gpu.uuid))] : [];
  return h("div", { class: `board${here ? " here" : ""}` },
    h("div", { class: "board-head" }, h("b", {}, `GPU ${gpu.index}`), h("span", {}, [`${Math.round(gpu.memory_mib / 1024)} GiB`,
      gpu.numa === null ? "" : `NUMA ${gpu.numa}`, gpu.mig ? `MIG, ${gpu.width} units` : gpu.phase, gpu.nvlink].filter(Boolean).join(" · ")),
    h("span", { class: "mono", title: gpu.uuid }, gpu.uuid)),
    drawGpu(gpu, true), ruler,
    gpu.reason ? h("p", { class: "why" }, gpu.reason) : null,
    (gpu.signals || []).map((signal) => h("p", { class: "why" }, signal)),
    gpu.note ? h("p", { class: "words" }, gpu.note) : null,
    h("ul", {}, rows));
}

/** A reason over many nodes is a list ("27 nodes: …; 4 nodes: …"); each entry gets a line. */
function reasonWords(reason) {
  const parts = reason.split(/; (?=\d+ nodes?: |and \d+ other)/);
  return parts.length < 2 ? h("p", { class: "words" }, reason) : h("ul", { class: "words" }, parts.map((part) => h("li", {}, part)));
}

function podDetail(uid) {
  const brief = seen.pods.find((p) => p.uid === uid);
  const full = seen.pod && seen.pod.uid === uid ? seen.pod : null;
  const pod = full && !full.missing ? { ...full, ...brief } : brief;
  if (!pod) {
    const words = full && full.missing ? `${full.missing}` : "asking the service …";
    return { title: uid, signature: words, age: () => "", body: () => [h("p", { class: "words" }, words)] };
  }
  const prices = Object.entries((full && full.prices) || {});
  return {
    title: podName(pod),
    signature: JSON.stringify([pod.phase, pod.demand, pod.node, pod.devices, (full && full.reason) || pod.reason, prices]),
    age: () => ago(pod.since_seconds),
    body: () => [
      facts([["Phase", [phaseTag(pod.phase)]], ["For", h("span", { "data-age": "" })], ["Asks", pod.demand],
        ["Node", pod.node ? h("a", { href: route("node", pod.node), "data-part": "node" }, pod.node) : "none yet"],
        ["UID", h("span", { class: "mono" }, pod.uid)]]),
      h("section", {}, h("h3", {}, pod.phase === "waiting" ? "Why it waits" : "Why here"),
        reasonWords((full && full.reason) || pod.reason || "No reason was recorded.")),
      (pod.devices || []).length ? h("section", {}, h("h3", {}, "Devices"), h("ul", { class: "mono" }, pod.devices.map((d, i) => h("li", {}, full && full.devices_in_words ? `${full.devices_in_words[i] || ""} ` : "", pod.node
        ? h("a", { href: route("node", pod.node, { gpu: d.split(/[/:]/)[0] }), "data-part": `d${d}` }, d) : d)))) : null,
      prices.length ? h("section", {}, h("h3", {}, "Price by goal, in milli-GPU"), h("table", { class: "list" }, h("tbody", {},
        prices.map(([goal, price]) => h("tr", {}, h("td", {}, goal.replaceAll("_", " ")), h("td", { class: "number" }, price.toLocaleString("en"))))))) : null,
      h("p", { class: "hint" }, "The same in a terminal: ", h("code", { class: "mono" }, `tangram explain ${podName(pod)}`)),
    ],
  };
}

// ------------------------------------------------------------------------------------------------------- asking

async function ask(path) {
  const answer = await fetch(path, { signal: AbortSignal.timeout(ANSWER_MS), cache: "no-store", headers: { Accept: "application/json" } });
  if (answer.status === 404) return { missing: (await answer.json().catch(() => ({}))).detail || "The service does not know it (released, or never seen)." };
  if (!answer.ok) throw new Error(`it answered ${answer.status}`);
  return answer.json();
}

const clusterPath = (after) => `v1/cluster?limit=${PAGE_NODES}` + (after ? `&after=${encodeURIComponent(after)}` : "");

/** All pods; of a large crowd the held ones (which change least) only every tenth time. */
async function askPods(totals) {
  const all = PHASES.reduce((n, phase) => n + (totals[`pods_${phase}`] || 0), 0);
  if (all <= MANY_PODS || seen.polls % 10 === 0) return (await ask("v1/pods")).pods;
  const lively = await Promise.all(PHASES.filter((p) => p !== "held").map((p) => ask(`v1/pods?phase=${p}`)));
  const fresh = lively.flatMap((answer) => answer.pods);
  const uids = new Set(fresh.map((pod) => pod.uid));
  return [...fresh, ...seen.pods.filter((pod) => pod.phase === "held" && !uids.has(pod.uid))];
}

async function askDetail() {
  const want = detailRoute();
  if (!want) return;
  if (want.pod) {
    const pod = await ask(`v1/pods/${encodeURIComponent(want.pod)}`);
    seen.pod = pod.missing ? { uid: want.pod, missing: pod.missing } : pod;
  } else if (!seen.nodes.some((node) => node.name === want.node)) {
    const node = await ask(`v1/nodes/${encodeURIComponent(want.node)}`);
    seen.node = node.missing ? { name: null, missing: want.node } : node;
  }
}

/** One row per pod: one that was refused before and is promised something now is no longer waiting. */
function onceEach(pods) {
  const byUid = new Map();
  for (const pod of pods) if (!byUid.has(pod.uid) || pod.phase !== "waiting") byUid.set(pod.uid, pod);
  return [...byUid.values()];
}

/** A filter must see every node, not only this page's: walk the pages now and then. */
async function sweep() {
  if (!choice.words.length || !seen.cluster || seen.cluster.totals.nodes <= PAGE_NODES) {
    if (!choice.words.length) seen.sweep = null;
    return;
  }
  if (seen.sweep && (!seen.sweep.done || Date.now() - seen.sweep.at < SWEEP_MS)) return;
  const run = { nodes: [], done: false, at: Date.now() };
  if (!seen.sweep) seen.sweep = run;
  let after = null;
  try {
    do {
      const part = await ask(clusterPath(after));
      run.nodes.push(...part.nodes);
      after = part.next;
      if (seen.sweep === run) draw();
    } while (after && choice.words.length);
  } finally {
    run.done = true;
    if (choice.words.length) seen.sweep = run;
  }
}

async function poll() {
  try {
    const page = seen.after;
    const cluster = await ask(clusterPath(page));
    const pods = await askPods(cluster.totals);
    if (page !== seen.after) return;
    seen.cluster = cluster;
    seen.nodes = cluster.nodes;
    seen.pods = onceEach(pods);
    seen.polls += 1;
    seen.answeredAt = Date.now();
    seen.failedSince = 0;
    remember(cluster.totals);
    rememberCosts(await ask("v1/costs"));
    await askDetail();
    sweep().catch(() => undefined);
  } catch (problem) {
    seen.failedSince = seen.failedSince || Date.now();
    seen.error = problem.name === "TimeoutError" ? `no answer within ${ANSWER_MS / 1000} s` : problem instanceof TypeError ? "no connection" : problem.message;
  }
  draw();
}

async function keepPolling() {
  for (;;) {
    const began = Date.now();
    if (!document.hidden || !seen.cluster) await poll();
    await new Promise((resolve) => { setTimeout(resolve, Math.max(100, POLL_MS - (Date.now() - began))); });
  }
}

// ---------------------------------------------------------------------------------------- hands: keys and pointer

/** One node link is in the tab order at a time; arrow keys move it. */
function roveTo(link, focus) {
  if (!link) return;
  for (const other of $("map").querySelectorAll("a[tabindex='0']")) if (other !== link) other.tabIndex = -1;
  link.tabIndex = 0;
  if (focus) { link.focus(); link.closest(".node").scrollIntoView({ block: "nearest" }); }
}

function onMapKey(event) {
  const links = [...$("map").querySelectorAll(".node-head a")];
  const at = links.indexOf(document.activeElement);
  if (at < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
  const top = (i) => links[i].closest(".node").offsetTop;
  const perRow = Math.max(1, links.findIndex((_, i) => top(i) !== top(0)) === -1 ? links.length : links.findIndex((_, i) => top(i) !== top(0)));
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + perRow, ArrowUp: at - perRow, Home: 0, End: links.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  roveTo(links[Math.min(links.length - 1, Math.max(0, to))], true);
}

function onMapClick(event) {
  const card = event.target.closest(".node");
  if (!card || event.target.closest("a") || String(getSelection())) return;
  const uid = event.target.closest("[data-uid]");
  const gpu = event.target.closest("[data-gpu]");
  roveTo(card.querySelector("a"), true);
  if (uid) location.hash = route("pod", uid.dataset.uid);
  else location.hash = route("node", card.dataset.key, gpu ? { gpu: gpu.dataset.gpu } : {});
}

/** Pointing at one device of a pod outlines all of them. */
function onMapPoint(event) {
  const uid = event.target.closest && event.target.closest("[data-uid]");
  for (const el of $("map").querySelectorAll(".same")) el.classList.remove("same");
  if (!uid) return;
  for (const el of $("map").querySelectorAll("[data-uid]")) if (el.dataset.uid === uid.dataset.uid) el.classList.add("same");
}

function turnPage(after, before) {
  seen.after = after;
  seen.pagesBefore = before;
  $("nodes").scrollIntoView();
  poll();
}

function start() {
  makeHead($("node-table"), NODE_COLUMNS, choice.nodeSort);
  makeHead($("pod-table"), POD_COLUMNS, choice.podSort);
  $("filter").addEventListener("input", (event) => {
    choice.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    sweep().catch(() => undefined);
    draw();
  });
  $("views").addEventListener("change", (event) => {
    choice.view = event.target.value;
    document.body.dataset.view = choice.view;
    draw();
  });
  $("map").addEventListener("keydown", onMapKey);
  $("map").addEventListener("focusin", (event) => { if (event.target.matches(".node-head a")) roveTo(event.target, false); });
  $("map").addEventListener("click", onMapClick);
  $("map").addEventListener("mouseover", onMapPoint);
  $("map").addEventListener("mouseleave", onMapPoint);
  $("next").addEventListener("click", () => turnPage(seen.cluster.next, [...seen.pagesBefore, seen.after]));
  $("previous").addEventListener("click", () => turnPage(seen.pagesBefore.at(-1) ?? null, seen.pagesBefore.slice(0, -1)));
  $("close").addEventListener("click", closeDetail);
  $("detail").addEventListener("cancel", (event) => { event.preventDefault(); closeDetail(); });
  $("detail").addEventListener("click", (event) => { if (event.target === $("detail")) closeDetail(); });
  $("detail").addEventListener("close", giveFocusBack);
  addEventListener("hashchange", () => { seen.pod = null; drawDetail(); askDetail().then(drawDetail, () => undefined); });
  addEventListener("popstate", drawDetail);
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !event.ctrlKey && !event.metaKey && !$("detail").open && !/^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName)) {
      event.preventDefault();
      $("filter").focus();
    } else if (event.key === "Escape" && document.activeElement === $("filter")) {
      $("filter").value = "";
      $("filter").dispatchEvent(new Event("input"));
    }
  });
  setInterval(drawState, 1000);
  keepPolling();
}

start();
