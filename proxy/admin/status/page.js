// Read the stream of states and show them. Everything is shown as text; nothing in a state is ever used as markup.

const TOKEN_KEY = "cairn.admin.token";
const RETRY_FIRST_MS = 500, RETRY_LAST_MS = 5000;
const SILENT_MS = 4000; // a state arrives every second; after this long without one the page says so
const PLOT_MS = 1900; // between two drawings of a plot
const BINS = 60;
const KEPT_SECONDS = 601, KEPT_MINUTES = 1441; // as the server keeps them
const CACHE_NAMES = { hit: "Hit", partial: "Partial", miss: "Miss" };
const MISSES = {
  cold: "no replica has any of it", changed: "starts like an earlier prompt, then differs", evicted: "was dropped for lack of room",
  elsewhere: "a replica that has more was too busy", down: "the replica that has it is down",
};
const ERRORS = {
  upstream_unreachable: "Replica unreachable", upstream_timeout: "Replica timed out", upstream_reset: "Replica closed the connection",
  upstream_tls: "TLS with the replica failed", upstream_protocol: "Replica sent invalid HTTP", upstream_failed: "Replica failed",
  upstream_broke: "Response cut off by the replica", truncated: "Stream without its end", upstream_error: "Error with status 200", upstream_4xx: "Error 4xx of the replica",
  upstream_5xx: "Error 5xx of the replica", no_upstream_available: "No replica available", proxy_overloaded: "Too many requests at once",
  rate_limit_exceeded: "Queue full, or rate limited", request_too_large: "Body too large", invalid_api_key: "Unknown API key",
  model_not_found: "Unknown model", model_not_allowed: "Model not allowed", path_not_allowed: "Path not allowed", unknown_path: "Unknown path",
  invalid_request_error: "Invalid request", timeout_error: "Client too slow", internal_error: "Defect in Cairn; see the log",
  context_not_found: "Unknown stored context", context_quota_exceeded: "Stored contexts: quota used up", contexts_unavailable: "Stored contexts unavailable",
};
const SHARING = { live: "up to date", starting: "starting", alone: "off; this proxy works alone" };

const reason = (code) => ERRORS[code] ?? code.replaceAll("_", " ").replace(/^./, (first) => first.toUpperCase());

const byId = (id) => document.getElementById(id);
const view = { state: null, seconds: [], minutes: [], range: 600, seenMs: 0, plotly: null, plots: {} };

// --- figures as text

const whole = new Intl.NumberFormat("en");
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });
const tokens = (n) => (n < 10000 ? whole.format(Math.round(n)) : compact.format(n).replace("K", "k"));
const cachedShare = (each) => (each.prompt_tokens > 0 && each.unknown_tokens >= each.prompt_tokens ? "?" : percent(each.cached_tokens, each.prompt_tokens));
const percent = (part, all) => (all > 0 ? `${((100 * part) / all).toFixed(1)} %` : "–");

const bytes = (n) => (n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(1)} MB`);

function money(usd) {
  const size = Math.abs(usd), sign = usd < 0 ? "−" : "";
  if (size === 0) return "$0";
  if (size < 0.0001) return `${sign}<$0.0001`;
  return `${sign}$${size.toLocaleString("en", size < 0.01 ? { maximumSignificantDigits: 2 } : { minimumFractionDigits: 2, maximumFractionDigits: 2 })}`;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
  if (days) return `${whole.format(days)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${minutes % 60} min`;
  return `${minutes} min ${Math.floor(seconds % 60)} s`;
}

function short(seconds) {
  if (seconds === null) return "–";
  if (seconds < 0.001) return `${Number((seconds * 1e6).toPrecision(2))} µs`;
  if (seconds < 1) return `${Number((seconds * 1e3).toPrecision(3))} ms`;
  return `${Number(seconds.toPrecision(3))} s`;
}

const ago = (then, now) => (now - then < 1.5 ? "now" : `${duration(Math.round(now - then)).replace(".0", "")} ago`);
const clock = (unix) => new Date(unix * 1000).toLocaleTimeString("en-GB");

// --- the document

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text; // an unchanged text is not announced again
}

// a word, and its meaning on a wide screen
function setTextAndAside(element, text, aside) {
  if (element.children.length !== 2) {
    element.replaceChildren(document.createElement("span"), document.createElement("span"));
    element.lastChild.className = "aside wide";
  }
  setText(element.firstChild, text);
  setText(element.lastChild, aside);
}

function figure(element, value, text) {
  element.value = String(value);
  setText(element, text);
}

// cells: {text, aside, kind, fill, value}; existing rows and cells are reused, so that a selection survives
function fill(id, rows, nothing) {
  const table = byId(id), body = table.tBodies[0];
  const labels = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
  const isEmpty = rows.length === 0;
  if (isEmpty) rows = [[{ text: nothing, span: labels.length }]];
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, at) => {
    const row = body.rows[at] ?? body.insertRow();
    row.setAttribute("role", "row");
    row.className = isEmpty ? "nothing" : "";
    while (row.cells.length > cells.length) row.deleteCell(-1);
    cells.forEach((cell, place) => {
      const td = row.cells[place] ?? row.insertCell();
      td.setAttribute("role", "cell");
      td.colSpan = cell.span ?? 1;
      td.dataset.label = isEmpty ? "" : labels[place];
      td.className = cell.kind ?? "";
      if (cell.value !== undefined) td.dataset.value = cell.value; else delete td.dataset.value;
      if (cell.paint === undefined) td.style.removeProperty("--paint"); else td.style.setProperty("--paint", cell.paint);
      td.classList.toggle("painted", cell.paint !== undefined);
      if (cell.fill === undefined) td.style.removeProperty("--fill"); else td.style.setProperty("--fill", `${cell.fill}%`);
      if (cell.aside === undefined) setText(td, cell.text); else setTextAndAside(td, cell.text, cell.aside);
    });
  });
}

function facts(id, pairs) {
  const list = byId(id);
  while (list.children.length > pairs.length) list.lastElementChild.remove();
  pairs.forEach(([name, text], at) => {
    let group = list.children[at];
    if (!group) {
      group = document.createElement("div");
      group.append(document.createElement("dt"), document.createElement("dd"));
      list.append(group);
    }
    setText(group.children[0], name);
    setText(group.children[1], text);
  });
}

// --- the parts of the page

function show(state) {
  showStatus(state);
  showStart(state);
  showFailures(state);
  showSaved(state);
  showReplicas(state);
  showPrefixes(state);
  showMisses(state);
  showContexts(state);
  showShared(state);
  fill("ttft", state.ttft.map((each) => [
    { text: CACHE_NAMES[each.cache], kind: "strong" },
    { text: whole.format(each.count), kind: "number", value: each.count },
    { text: short(each.p50_seconds), kind: "number" },
    { text: short(each.p95_seconds), kind: "number" },
  ]), "No streamed response yet");
  byId("figures").dataset.requests = state.requests;
}

function showStatus(state) {
  document.body.className = `is-${state.status.replace(" ", "-")}`;
  setText(byId("mark"), { ready: "●", degraded: "◐" }[state.status] ?? "○");
  setText(byId("status"), state.status[0].toUpperCase() + state.status.slice(1));
  const up = state.replicas.filter((each) => each.up).length, failed = failedWithin(600);
  setText(byId("replicas-up"), state.replicas.length ? `${up} of ${state.replicas.length}` : "–");
  byId("replicas-up").className = up < state.replicas.length ? "alert" : "";
  setText(byId("failed"), whole.format(failed));
  byId("failed").className = failed ? "alert" : "";
  setText(byId("waiting"), whole.format(state.waiting));
  setText(byId("in-flight"), whole.format(state.in_flight));
  setText(byId("rate"), state.requests_per_second.toFixed(state.requests_per_second < 10 ? 1 : 0));
  setText(byId("requests"), whole.format(state.requests));
  setText(byId("workers"), whole.format(state.workers));
  setText(byId("uptime"), duration(Math.floor(state.now_unix_seconds - state.started_unix_seconds)).replace(".0", ""));
  setText(byId("version"), `Cairn ${state.version}`);
  const list = byId("notices");
  const lines = [...state.reasons.map((text) => [text, "reason"]), ...state.notices.map((text) => [text, ""])];
  list.hidden = lines.length === 0;
  while (list.children.length > lines.length) list.lastElementChild.remove();
  lines.forEach(([text, kind], at) => {
    const item = list.children[at] ?? list.appendChild(document.createElement("li"));
    item.className = kind;
    setText(item, text);
  });
}

// Before the first request: where to send it.
function showStart(state) {
  byId("start").hidden = state.requests > 0 || !state.base_url;
  setText(byId("base-url"), state.base_url);
  const body = JSON.stringify({ model: state.example_model, messages: [{ role: "user", content: "Hello" }] });
  setText(byId("curl"), `curl ${state.base_url}/chat/completions -H 'Content-Type: application/json' -d '${body}'`);
}

const total = (errors) => Object.values(errors).reduce((sum, count) => sum + count, 0);

// the failed requests of the last seconds, as far as they are known
function failedWithin(seconds) {
  const last = view.seconds[view.seconds.length - 1];
  if (!last) return 0;
  const first = view.seconds.find((sample) => sample[0] >= last[0] - seconds) ?? last;
  const before = view.seconds[0] === first && view.state.now_unix_seconds - view.state.started_unix_seconds < seconds ? {} : first[4];
  return total(last[4]) - total(before);
}

function showFailures(state) {
  const down = state.replicas.filter((each) => !each.up);
  const nothing = down.length === 0 && state.recent_errors.length === 0;
  byId("no-failures").hidden = !nothing;
  byId("failure-details").hidden = nothing;
  byId("down").hidden = down.length === 0;
  byId("errors").hidden = state.recent_errors.length === 0;
  if (nothing) return;
  fill("down", down.map((each) => [
    { text: each.name, kind: "strong" },
    { text: each.why || "no answer", kind: "alert long" },
    { text: each.down_since_unix_seconds === null ? "–" : duration(Math.round(state.now_unix_seconds - each.down_since_unix_seconds)).replace(".0", ""), kind: "number" },
  ]), "All replicas are up");
  fill("errors", state.recent_errors.map((each) => [
    { text: each.client || "unknown", kind: "strong" },
    { text: each.model, kind: "long" },
    { text: reason(each.reason), kind: "long" },
    { text: whole.format(each.count), kind: "number", value: each.count },
    { text: ago(each.last_unix_seconds, state.now_unix_seconds), kind: "number quiet" },
  ]), "No failed request in the last hour");
}

function showSaved(state) {
  const unpriced = Object.values(state.unpriced).reduce((sum, count) => sum + count, 0);
  for (const period of document.querySelectorAll("[data-period]")) {
    const saved = state.saved[period.dataset.period];
    const part = (name) => period.querySelector(`[data-figure="${name}"]`);
    const remark = period.querySelector(".remark");
    period.classList.toggle("empty", !saved);
    if (!saved) {
      for (const each of period.querySelectorAll("data")) figure(each, "", "–");
      setText(remark, "Not available: the totals in Redis cannot be read");
      continue;
    }
    const noPrice = saved.uncached_cost_usd === 0 && unpriced > 0;
    figure(part("usd"), saved.usd, noPrice ? "no price" : money(saved.usd));
    part("usd").parentElement.classList.toggle("loss", saved.usd < 0);
    period.classList.toggle("unpriced", noPrice);
    figure(part("prefill_seconds"), saved.prefill_seconds, duration(saved.prefill_seconds));
    figure(part("cached_tokens"), saved.cached_tokens, tokens(saved.cached_tokens));
    figure(part("prompt_tokens"), saved.prompt_tokens, tokens(saved.prompt_tokens));
    setText(remark, remarkOn(saved));
  }
  const since = state.saved["since start"];
  figure(byId("share"), since.prompt_tokens ? since.cached_tokens / since.prompt_tokens : 0, cachedShare(since));
  byId("share-bar").style.width = since.prompt_tokens ? `${(100 * since.cached_tokens) / since.prompt_tokens}%` : "0";
  setText(byId("gain"), gainOf(state.routing_gain_tokens, since.cached_tokens));
}

function remarkOn(saved) {
  if (!saved.uncached_cost_usd) return "";
  const paid = saved.uncached_cost_usd - saved.usd;
  const written = saved.surcharge_usd ? `, ${money(saved.surcharge_usd)} of it for cache writes` : "";
  return `Paid ${money(paid)} instead of ${money(saved.uncached_cost_usd)}${written}`;
}

function gainOf(gained, cached) {
  if (!gained) return "of all prompt tokens since start";
  return `of prompt tokens since start; ${tokens(gained)} cached tokens (${percent(gained, cached)}) are due to routing: round robin would have missed them`;
}

function showReplicas(state) {
  fill("replicas", state.replicas.map((each) => {
    const status = each.up ? (each.breaker === "closed" ? "up" : "up, being tried again") : "down";
    const resident = each.budget_tokens ? `${tokens(each.resident_tokens)} of ${tokens(each.budget_tokens)}` : tokens(each.resident_tokens);
    return [
      { text: each.name, kind: "strong" },
      { text: status, kind: each.up ? "" : "alert" },
      { text: whole.format(each.in_flight), kind: "number" },
      { text: whole.format(each.queued), kind: "number" },
      { text: tokens(each.pending_tokens), kind: "number" },
      { text: resident, kind: "number" },
      { text: cachedShare(each), kind: "number filled", fill: each.prompt_tokens ? (100 * each.cached_tokens) / each.prompt_tokens : 0 },
      { text: tokens(each.predicted_tokens), kind: "number", value: each.predicted_tokens },
      { text: tokens(each.cached_tokens), kind: "number", value: each.cached_tokens },
      { text: each.prefill_tokens_per_second ? tokens(each.prefill_tokens_per_second) : "–", kind: "number" },
    ];
  }), "No replica is known yet");
}

function showPrefixes(state) {
  const most = state.prefixes[0]?.saved_tokens || 1;
  fill("prefixes", state.prefixes.map((each) => [
    { text: String(each.number), kind: "number quiet wide" },
    { text: each.model, kind: "title" },
    { text: tokens(each.tokens), kind: "number", value: each.tokens },
    { text: whole.format(each.hits), kind: "number", value: each.hits },
    { text: tokens(each.saved_tokens), kind: "number filled", fill: (100 * each.saved_tokens) / most, value: each.saved_tokens },
    { text: ago(each.used_unix_seconds, state.now_unix_seconds), kind: "number quiet" },
  ]), "No prefix was cached yet");
}

function showMisses(state) {
  const reasons = Object.entries(state.miss_reasons).sort((one, other) => other[1] - one[1]);
  setText(byId("miss-reasons"), reasons.map(([name, count]) => `${whole.format(count)} ${name}`).join(" · "));
  fill("misses", state.misses.map((each) => [
    { text: clock(each.unix_seconds), kind: "number quiet" },
    { text: each.reason, aside: MISSES[each.reason] },
    { text: each.upstream, kind: "wide" },
    { text: each.cached_tokens === null ? "?" : tokens(each.prompt_tokens - each.cached_tokens), kind: "number" },
    { text: tokens(each.prompt_tokens), kind: "number" },
  ]), "No miss yet");
}

function showContexts(state) {
  byId("contexts-section").hidden = state.stored.length === 0;
  fill("contexts", state.stored.map((each) => [
    { text: each.model, kind: "title" },
    { text: each.pinned ? `${each.status}, pinned` : each.status, kind: each.status === "error" ? "alert" : "" },
    { text: tokens(each.tokens), kind: "number", value: each.tokens },
    { text: bytes(each.size_bytes), kind: "number", value: each.size_bytes },
    { text: money(each.worth_usd_per_hour), kind: "number", value: each.worth_usd_per_hour },
  ]), "No context is stored");
}

function showShared(state) {
  const { redis, sharing } = state;
  const dropped = Object.values(sharing.dropped).reduce((sum, count) => sum + count, 0);
  const states = Object.entries(sharing.states).map(([name, count]) => (state.workers > 1 ? `${SHARING[name] ?? name} (${count})` : SHARING[name] ?? name));
  facts("shared", [
    ["Redis", redis.state],
    ["Redis operations", `${tokens(redis.operations)}, ${whole.format(redis.errors)} failed`],
    ["Median, 95th percentile", `${short(redis.p50_seconds)}, ${short(redis.p95_seconds)}`],
    ["Shared routing data", states.join(", ") || "starting"],
    ["Delay of updates", short(sharing.lag_seconds || null)],
    ["Updates sent, received", `${tokens(sharing.written)}, ${tokens(sharing.read)}`],
    ["Updates discarded", whole.format(dropped)],
    ["Full reloads of shared data", whole.format(sharing.rebuilds)],
    ["Workers of other proxies", whole.format(Math.max(0, sharing.others - Math.max(0, state.workers - 1)))],
    ["Stored contexts", state.contexts ? `${whole.format(state.contexts)}, ${bytes(state.contexts_bytes)}` : "none"],
  ]);
}

// --- plots

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function layout(more) {
  const axis = { fixedrange: true, zeroline: false, gridcolor: colour("hair"), linecolor: colour("rule"), tickcolor: colour("rule"), automargin: true };
  const { xaxis, yaxis, yaxis2, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, autosize: true, bargap: 0.12,
    font: { family: getComputedStyle(document.body).fontFamily, size: 11, color: colour("soft") },
    hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("rule"), font: { color: colour("ink") } },
    margin: { l: 38, r: 4, t: 18, b: 22 }, dragmode: false,
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...(yaxis2 && { yaxis2: { ...axis, ...yaxis2 } }), ...rest,
  };
}

const OPTIONS = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };

const note = (text, x, y, more) => ({ text, x, y, xref: "paper", yref: "paper", showarrow: false, xanchor: "left", yanchor: "bottom", ...more });

// The growth of the counters in BINS equal parts of the last `range` seconds, or of a shorter history.
function bins() {
  const now = view.state.now_unix_seconds;
  const readings = view.range <= 600 ? view.seconds : [...view.minutes, ...view.seconds.slice(-1)];
  const known = now - view.state.started_unix_seconds;
  const range = Math.min(view.range, Math.max(known, view.range / 5));
  const width = view.range <= 600 ? Math.ceil(range / BINS) : 60 * Math.ceil(range / BINS / 60);
  const last = Math.floor(now / width), first = last - Math.ceil(range / width) + 1;
  const found = Array.from({ length: last - first + 1 }, (_, at) => ({ at: (first + at) * width, requests: 0, prompt: 0, cached: 0, errors: {} }));
  for (let at = 1; at < readings.length; at += 1) {
    const bin = found[Math.floor(readings[at][0] / width) - first];
    if (!bin) continue;
    bin.requests += readings[at][1] - readings[at - 1][1];
    bin.prompt += readings[at][2] - readings[at - 1][2];
    bin.cached += readings[at][3] - readings[at - 1][3];
    for (const [code, count] of Object.entries(readings[at][4])) {
      const grown = count - (readings[at - 1][4][code] ?? 0);
      if (grown > 0) bin.errors[code] = (bin.errors[code] ?? 0) + grown;
    }
  }
  return { found, width };
}

function drawTime(found, width) {
  const x = found.map((bin) => new Date((bin.at + width / 2) * 1000));
  const share = (part) => found.map((bin) => (bin.prompt > 0 ? (100 * part(bin)) / bin.prompt : null));
  const hover = found.map((bin) => `${tokens(bin.cached)} of ${tokens(bin.prompt)} prompt tokens`);
  const bar = { type: "bar", x, width: width * 900 };
  const prompt = found.reduce((sum, bin) => sum + bin.prompt, 0), cached = found.reduce((sum, bin) => sum + bin.cached, 0);
  const asked = found.reduce((sum, bin) => sum + bin.requests, 0);
  const edges = [new Date(found[0].at * 1000), new Date((found[found.length - 1].at + width) * 1000)];
  window.Plotly.react("time-plot", [
    { ...bar, y: share((bin) => bin.cached), marker: { color: colour("warm") }, customdata: hover, hovertemplate: "%{x|%H:%M:%S}: %{y:.0f} % cached<br>%{customdata}<extra></extra>" },
    { ...bar, y: share((bin) => bin.prompt - bin.cached), marker: { color: colour("stone") }, hoverinfo: "skip" },
    { ...bar, y: found.map((bin) => bin.requests / width), yaxis: "y2", marker: { color: colour("soft") }, hovertemplate: "%{x|%H:%M:%S}: %{y:.2~f} requests/s<extra></extra>" },
  ], layout({
    barmode: "stack",
    xaxis: { type: "date", range: edges, showgrid: false, anchor: "y2", nticks: 7, tickformat: width < 30 ? "%H:%M:%S" : "%H:%M" },
    yaxis: { domain: [0.42, 1], range: [0, 100], tickvals: [0, 50, 100], ticktext: ["0", "50", "100 %"] },
    yaxis2: { domain: [0, 0.27], rangemode: "tozero", nticks: 3, anchor: "x" },
    annotations: [
      note("<b>Cached</b>", 0, 1, { font: { color: colour("warm") } }),
      note("and computed share of prompt tokens", 0, 1, { xshift: 47 }),
      note("Requests per second", 0, 0.27),
    ],
  }), OPTIONS);
  byId("time-plot").setAttribute("aria-label", `${percent(cached, prompt)} of ${tokens(prompt)} prompt tokens cached in ${whole.format(asked)} requests in the time shown`);
}

// Failed requests over time, one colour for each of the most frequent reasons; the table is the legend.
function drawErrors(found, width) {
  const x = found.map((bin) => new Date((bin.at + width / 2) * 1000));
  const sums = {};
  for (const bin of found) for (const [code, count] of Object.entries(bin.errors)) sums[code] = (sums[code] ?? 0) + count;
  const codes = Object.keys(sums).sort((one, other) => sums[other] - sums[one]);
  const most = Math.max(...found.map((bin) => total(bin.errors)));
  const paints = ["alert", "part", "cold", "soft"].map(colour);
  const paint = (at) => paints[Math.min(at, paints.length - 1)];
  const edges = [new Date(found[0].at * 1000), new Date((found[found.length - 1].at + width) * 1000)];
  window.Plotly.react("error-plot", codes.map((code, at) => ({
    type: "bar", x, width: width * 900, name: reason(code), marker: { color: paint(at) },
    y: found.map((bin) => bin.errors[code] ?? 0), hovertemplate: `%{x|%H:%M:%S}: %{y} ${reason(code)}<extra></extra>`,
  })), layout({
    barmode: "stack", margin: { l: 38, r: 4, t: 6, b: 22 },
    xaxis: { type: "date", range: edges, showgrid: false, nticks: 7, tickformat: width < 30 ? "%H:%M:%S" : "%H:%M" },
    yaxis: { rangemode: "tozero", nticks: 3, tickformat: "~s", ...(most <= 2 && { dtick: 1 }) }, // no half requests
  }), OPTIONS);
  byId("error-plot").setAttribute("aria-label", `${whole.format(total(sums))} failed requests in the time shown`);
  const all = Object.entries(view.state.errors).sort((one, other) => (sums[other[0]] ?? 0) - (sums[one[0]] ?? 0) || other[1] - one[1]);
  fill("reasons", all.slice(0, 6).map(([code, count]) => [
    { text: reason(code), kind: sums[code] ? "strong" : "", paint: sums[code] ? paint(codes.indexOf(code)) : undefined },
    { text: whole.format(sums[code] ?? 0), kind: "number", value: sums[code] ?? 0 },
    { text: whole.format(count), kind: "number quiet" },
  ]), "No failed request since start");
}

function drawTtft() {
  const { ttft, ttft_bounds: bounds } = view.state;
  if (!ttft.length) {
    window.Plotly.react("ttft-plot", [], layout({ xaxis: { visible: false }, yaxis: { visible: false }, annotations: [note("No streamed response yet", 0, 0.5)] }), OPTIONS);
    return;
  }
  const filled = bounds.concat(0).map((_, at) => ttft.some((each) => each.counts[at]));
  const from = Math.max(0, filled.indexOf(true) - 1), to = Math.min(bounds.length, filled.lastIndexOf(true) + 1);
  const names = bounds.map(short).concat(`> ${short(bounds[bounds.length - 1])}`).slice(from, to + 1);
  const colours = { hit: "warm", partial: "part", miss: "cold" };
  const rows = ttft.length, isCrowded = names.length * 52 > byId("ttft-plot").clientWidth - 70;
  const traces = [], axes = {}, annotations = [];
  ttft.forEach((each, row) => {
    const number = row ? row + 1 : "";
    const shares = each.counts.slice(from, to + 1).map((count) => (100 * count) / each.count);
    const top = 1 - row / rows;
    traces.push({ type: "bar", x: names, y: shares, yaxis: `y${number}`, marker: { color: colour(colours[each.cache]) }, name: CACHE_NAMES[each.cache], hovertemplate: `${CACHE_NAMES[each.cache]}: %{y:.1f} % within %{x}<extra></extra>` });
    axes[`yaxis${number}`] = { domain: [top - 0.8 / rows, top], rangemode: "tozero", showticklabels: false, ticks: "", showgrid: false, fixedrange: true, zeroline: true, zerolinecolor: colour("rule"), anchor: "x" };
    annotations.push(note(`<b>${CACHE_NAMES[each.cache]}</b>`, 0, top, { xanchor: "left", yanchor: "top", xshift: -64, font: { color: colour(colours[each.cache]), size: 12 } }));
  });
  window.Plotly.react("ttft-plot", traces, layout({
    ...axes, annotations, margin: { l: 64, r: 4, t: 6, b: isCrowded ? 46 : 30 }, bargap: 0.08,
    xaxis: { type: "category", categoryorder: "array", categoryarray: names, anchor: `y${rows > 1 ? rows : ""}`, tickvals: names, tickangle: isCrowded ? -60 : 0, showgrid: false },
  }), OPTIONS);
  byId("ttft-plot").setAttribute("aria-label", ttft.map((each) => `${CACHE_NAMES[each.cache]}: median of ${whole.format(each.count)} responses ${short(each.p50_seconds)}`).join("; "));
}

// A plot costs more than everything else here, so it is drawn only if its data changed.
function draw() {
  if (!view.plotly || !view.state || document.hidden) return;
  const look = [colour("paper"), innerWidth];
  const { found, width } = bins();
  drawIfNew("time", [look, width, found], () => drawTime(found, width));
  if (!byId("failure-details").hidden) drawIfNew("errors", [look, width, found.map((bin) => [bin.at, bin.errors])], () => drawErrors(found, width));
  drawIfNew("ttft", [look, view.state.ttft], drawTtft);
}

function drawIfNew(name, content, drawing) {
  const key = JSON.stringify(content), now = Date.now();
  const { drawn, atMs, look } = view.plots[name] ?? {};
  const sameLook = JSON.stringify(content[0]) + view.range;
  if (drawn === key || (sameLook === look && now - atMs < PLOT_MS)) return;
  view.plots[name] = { drawn: key, atMs: now, look: sameLook };
  drawing();
}

function loadPlotly() {
  if (view.plotly !== null) return;
  view.plotly = false;
  const script = document.createElement("script");
  script.src = "plotly.min.js";
  script.onload = () => { view.plotly = true; draw(); };
  script.onerror = () => {
    for (const plot of document.querySelectorAll(".plot")) setText(plot, "Plots need the Python package plotly.");
  };
  document.head.append(script);
}

// --- the stream

function take(event, text) {
  const content = JSON.parse(text);
  if (event === "history") {
    view.seconds = content.seconds;
    view.minutes = content.minutes;
    return;
  }
  view.state = content;
  view.seenMs = Date.now();
  remember(content.sample);
  show(content);
  draw();
  showConnection();
}

function remember(sample) {
  if (!sample) return;
  const last = view.seconds[view.seconds.length - 1];
  if (last && sample[0] <= last[0]) return;
  view.seconds.push(sample);
  if (view.seconds.length > KEPT_SECONDS) view.seconds.shift();
  const minute = view.minutes[view.minutes.length - 1];
  if (!minute || sample[0] - minute[0] >= 60) view.minutes.push(sample);
  if (view.minutes.length > KEPT_MINUTES) view.minutes.shift();
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const [first, second] = block.split("\n");
      yield [first.slice("event: ".length), second.slice("data: ".length)];
    }
  }
}

async function follow(token) {
  const headers = token ? { Authorization: `Bearer ${token}` } : {};
  const answer = await fetch("events", { headers, cache: "no-store" });
  if (answer.status === 401) return "refused";
  if (!answer.ok) throw new Error(String(answer.status));
  askForToken(false);
  loadPlotly();
  for await (const [event, text] of events(answer.body)) take(event, text);
  return "ended";
}

async function live() {
  let pause = RETRY_FIRST_MS;
  for (;;) {
    const token = sessionStorage.getItem(TOKEN_KEY), before = view.seenMs;
    const how = await follow(token).catch(() => "lost");
    if (how === "refused") {
      sessionStorage.removeItem(TOKEN_KEY);
      askForToken(true, token ? "This is not the admin token." : "");
      return;
    }
    pause = view.seenMs > before ? RETRY_FIRST_MS : Math.min(pause * 2, RETRY_LAST_MS);
    await new Promise((resume) => setTimeout(resume, pause));
  }
}

function askForToken(isNeeded, error = "") {
  byId("login").hidden = !isNeeded;
  byId("figures").hidden = isNeeded;
  byId("forget").hidden = isNeeded || !sessionStorage.getItem(TOKEN_KEY);
  setText(byId("login-error"), error);
  if (isNeeded) {
    setText(byId("status"), "Locked");
    setText(byId("connection"), "Not connected");
    byId("token").focus();
  }
}

function showConnection() {
  const isLive = Date.now() - view.seenMs < SILENT_MS;
  if (!view.seenMs) return;
  setText(byId("connection"), isLive ? "Live" : "Disconnected: the figures are old. Trying again.");
  setText(byId("clock"), `· ${clock(view.state.now_unix_seconds)}`);
  document.body.classList.toggle("is-lost", !isLive);
  if (!isLive) {
    setText(byId("mark"), "○");
    setText(byId("status"), "Disconnected");
  }
}

byId("login").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN_KEY, byId("token").value);
  byId("token").value = "";
  live();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(TOKEN_KEY);
  location.reload();
});
byId("range").addEventListener("change", (event) => {
  view.range = Number(event.target.value);
  draw();
});
document.addEventListener("visibilitychange", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
setInterval(showConnection, 1000);
live();
