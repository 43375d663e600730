// Keeps a page fresh: cells from the stream, pictures, parts that came or went, trying a model.
// Every page is complete without it. All texts are set as text.
"use strict";
(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const SPAN = 60, POINTS = 120;

  // --- cells ---------------------------------------------------------------------------------

  let cells = new Map(), meters = new Map();
  function index() {
    cells = new Map();
    meters = new Map();
    for (const [into, name] of [[cells, "k"], [meters, "m"]]) {
      for (const el of document.querySelectorAll(`[data-${name}]`)) {
        const key = el.dataset[name];
        if (!into.has(key)) into.set(key, []);
        into.get(key).push(el);
      }
    }
  }
  function write(changed) {
    for (const [key, text] of Object.entries(changed.cells))
      for (const el of cells.get(key) || []) if (el.textContent !== text) el.textContent = text;
    for (const [key, value] of Object.entries(changed.meters))
      for (const el of meters.get(key) || []) el.value = value;
  }

  // --- parts that came or went ------------------------------------------------------------------

  let fetching = false;
  async function refetch() {
    if (fetching || !document.querySelector("[data-part]")) return;
    fetching = true;
    try {
      const answer = await fetch(location.pathname, { headers: { accept: "text/html" } });
      if (!answer.ok || answer.redirected) return;
      const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
      const found = new Map();
      for (const el of fresh.querySelectorAll("[data-part]")) found.set(el.dataset.part, el);
      for (const el of document.querySelectorAll("[data-part]")) {
        const next = found.get(el.dataset.part);
        if (!next || next.isEqualNode(el) || el.contains(document.activeElement)) continue;
        const log = el.querySelector("pre.log");
        const at = log && log.scrollTop + log.clientHeight >= log.scrollHeight - 4 ? -1 : log && log.scrollTop;
        el.replaceWith(document.adoptNode(next));
        const now = next.querySelector("pre.log");
        if (now) now.scrollTop = at === -1 ? now.scrollHeight : at;
      }
      document.body.dataset.shape = fresh.body.dataset.shape;
      index();
    } catch {
      // The stream says when the node is away.
    } finally {
      setTimeout(() => { fetching = false; }, 1500);
    }
  }

  // --- pictures ------------------------------------------------------------------------------

  let names = {}, past = [], points = [], charts = [];
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const colour = (who) => {
    if (who === "idle") return css("--line");
    const at = Object.keys(names).sort().indexOf(who);
    return css(`--c${(at < 0 ? 7 : at) % 8}`);
  };
  const shown = (value) => value == null ? "–" : value >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(value < 10 ? 2 : 1);

  function axes(unit) {
    const base = { stroke: css("--quiet"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 } };
    const pad = (n) => String(n).padStart(2, "0");
    const clock = (s) => { const t = new Date(s * 1000); return `${pad(t.getHours())}:${pad(t.getMinutes())}:${pad(t.getSeconds())}`; };
    return [{ ...base, space: 90, incrs: [1, 2, 5, 10, 15, 30, 60], values: (_, v) => v.map(clock) }, { ...base, size: 60, label: unit, labelSize: 20, values: (_, v) => v.map((x) => x.toLocaleString("en")) }];
  }
  function draw(chart, unit, series, data, most) {
    const width = Math.max(240, chart.place.clientWidth);
    const range = most ? [0, most] : (_, __, top) => [0, top > 0 ? top * 1.1 : 1];
    const shape = JSON.stringify(series.map((s) => s.label));
    if (chart.plot && chart.shape === shape) {
      chart.plot.setData(data);
      return;
    }
    if (chart.plot) chart.plot.destroy();
    chart.shape = shape;
    chart.plot = new uPlot({
      width, height: 190, axes: axes(unit), series: [{ label: "Time", value: "{HH}:{mm}:{ss}" }, ...series],
      scales: { x: { time: true }, y: { range } }, cursor: { drag: { x: false, y: false } },
    }, data, chart.place);
  }
  function device(chart) {
    const most = Number(chart.el.dataset.most), of = chart.el.dataset.of;
    const who = [...new Set(past.flatMap((p) => Object.keys(p[2][of] || {})))].sort().reverse();
    const x = past.map((p) => p[0]);
    let sum = x.map(() => 0);
    const layers = who.map((w) => {
      const own = past.map((p) => (p[2][of] || {})[w] || 0);
      sum = sum.map((s, i) => s + own[i]);
      return { w, own, sum };
    }).reverse();
    const stepped = uPlot.paths.stepped({ align: -1 });
    const series = layers.map((l, i) => ({
      label: names[l.w] || l.w, stroke: colour(l.w), fill: colour(l.w), width: 1, paths: stepped, points: { show: false },
      value: (_, __, ___, at) => at == null ? "–" : shown((chart.layers[i] || l).own[at]),
    }));
    chart.layers = layers;
    draw(chart, "units", series, [x, ...layers.map((l) => l.sum)], most);
  }
  function lines(chart, unit, which) {
    const of = chart.el.dataset.of, x = points.map((p) => p[0]);
    const line = (label, stroke, more) => ({ label, stroke, width: 2, points: { show: x.length < 3 }, value: (_, v) => shown(v), ...more });
    const series = [line(which[0], css("--c0"))], data = [x, points.map((p) => (p[1][of] || [])[which[1]] ?? null)];
    const objective = Number(chart.el.dataset.objective || 0);
    if (objective) {
      series.push(line("objective", css("--c1"), { dash: [6, 4], points: { show: false } }));
      data.push(x.map(() => objective));
    }
    draw(chart, unit, series, data);
  }
  const KINDS = {
    device,
    latency: (c) => lines(c, "ms", ["p95", 0]),
    rate: (c) => lines(c, "requests/s", ["requests/s", 1]),
    progress: (c) => lines(c, "progress/s", ["progress/s", 0]),
  };
  function redraw(anew) {
    for (const chart of charts) {
      if (anew && chart.plot) { chart.plot.destroy(); chart.plot = null; }
      KINDS[chart.el.dataset.chart](chart);
    }
  }
  function find() {
    charts = [...document.querySelectorAll("figure[data-chart]")].map((el) => ({ el, place: el.querySelector(".plot"), plot: null }));
    const sizes = new ResizeObserver((entries) => {
      for (const entry of entries) {
        const chart = charts.find((c) => c.place === entry.target), width = Math.floor(entry.contentRect.width);
        if (chart && chart.plot && width > 0 && width !== chart.plot.width) chart.plot.setSize({ width, height: 190 });
      }
    });
    for (const chart of charts) sizes.observe(chart.place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw(true));
  }

  // --- the stream ------------------------------------------------------------------------------

  const live = document.getElementById("live");
  let source = null, stopped = false, pause = null, first = true;
  const say = (text) => { if (live && live.firstChild.data !== text) live.firstChild.data = text; };
  function take(event) {
    if (first) { past = []; points = []; first = false; }
    Object.assign(names, event.names);
    past = past.concat(event.past);
    while (past.length && past[0][0] < past[past.length - 1][0] - SPAN) past.shift();
    points = points.concat(event.points).slice(-POINTS);
    write(event);
    redraw(false);
    if (event.shape !== document.body.dataset.shape) refetch();
    say("Live. ");
  }
  function open() {
    if (source || stopped || document.hidden) return;
    first = true;
    source = new EventSource("/dashboard/events");
    source.onmessage = (message) => take(JSON.parse(message.data));
    source.onerror = () => {
      say("Not live: the node does not answer. ");
      first = true;
      if (source && source.readyState === EventSource.CLOSED) {
        close();
        setTimeout(open, 10000);
      }
    };
  }
  function close() {
    if (source) source.close();
    source = null;
  }
  function start() {
    live.append(document.createTextNode("Connecting … "));
    pause = document.createElement("button");
    pause.type = "button";
    pause.textContent = "Pause";
    pause.setAttribute("aria-pressed", "false");
    pause.addEventListener("click", () => {
      stopped = !stopped;
      pause.setAttribute("aria-pressed", String(stopped));
      if (stopped) { close(); say("Paused. "); } else open();
    });
    live.after(pause);
    document.addEventListener("visibilitychange", () => document.hidden ? close() : open());
    addEventListener("pagehide", close);
    index();
    find();
    open();
    const log = document.querySelector("pre.log");
    if (log) log.scrollTop = log.scrollHeight;
    const every = document.querySelector("[data-every]");
    if (every) setInterval(() => { if (!stopped && !document.hidden) refetch(); }, 1000 * Number(every.dataset.every));
  }

  // --- trying a model ----------------------------------------------------------------------------

  for (const form of document.querySelectorAll("form[data-try]")) {
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const answer = form.querySelector("output"), button = form.querySelector("button");
      button.disabled = true;
      answer.textContent = "…";
      try {
        const said = await fetch(form.action, {
          method: "POST", headers: { accept: "application/json" }, body: new URLSearchParams(new FormData(form)),
        });
        const told = said.headers.get("content-type") === "application/json" ? await said.json() : null;
        answer.textContent = told ? `${told.headline}\n${told.text}` : `status ${said.status}; load the page again`;
      } catch {
        answer.textContent = "the node does not answer";
      }
      button.disabled = false;
      button.focus();
    });
  }

  // Where a page only waits for something, it loads itself again.
  const wait = document.querySelector("head noscript");
  const waits = wait && /content="(\d+)"/.exec(wait.textContent);
  if (waits && !live) setTimeout(() => location.reload(), 1000 * Number(waits[1]));

  if (live) start();
})();
