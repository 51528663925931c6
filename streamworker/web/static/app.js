// What the pages do beyond showing: charts, live parts, ticking rows, asking before acting, keys.
"use strict";
(() => {
  const $ = (selector, root = document) => root.querySelector(selector);
  const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const meta = (name) => $(`meta[name="${name}"]`).content;
  const root = meta("root");
  const live = $("#live");

  // -- numbers

  const count = (value) => value == null ? "" : Math.abs(value) >= 10000 ? short(value) : Math.round(value).toLocaleString("en");
  const short = (value) => {
    const size = Math.abs(value);
    if (size >= 1e9) return `${+(value / 1e9).toFixed(1)}G`;
    if (size >= 1e6) return `${+(value / 1e6).toFixed(1)}M`;
    if (size >= 1e3) return `${+(value / 1e3).toFixed(1)}k`;
    return `${+value.toFixed(size < 10 ? 1 : 0)}`;
  };
  const age = (seconds) => {
    if (seconds == null) return "–";
    if (seconds < 10) return `${+seconds.toFixed(1)}s`;
    if (seconds < 60) return `${Math.round(seconds)}s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)}m`;
    if (seconds < 86400) return `${+(seconds / 3600).toFixed(1)}h`;
    return `${+(seconds / 86400).toFixed(1)}d`;
  };

  // -- charts: points are [at, ready, running, delayed, dead, rate, oldest]

  const KINDS = {
    rate: { series: [5], unit: short, last: (point) => point[5] == null ? "–" : `${short(point[5])}/s` },
    oldest: { series: [6], unit: age, last: (point) => age(point[6]) },
    depth: { series: [1, 2], unit: short, last: (point) => `${short(point[1])} · ${short(point[2])}` },
    dead: { series: [3, 4], unit: short, last: (point) => `${short(point[3])} · ${short(point[4])}` },
  };
  const MOST = 900;
  const charts = [];
  let points = [];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const columns = (kind) => [points.map((point) => point[0]), ...kind.series.map((at) => points.map((point) => point[at]))];

  function draw(place) {
    const kind = KINDS[place.dataset.chart];
    const axis = { stroke: color("--dim"), grid: { stroke: color("--line"), width: 1 }, ticks: { show: false }, font: "10px system-ui, sans-serif" };
    const plot = new uPlot({
      width: place.clientWidth, height: place.clientHeight, padding: [6, 4, 0, 0],
      cursor: { y: false, points: { size: 5 }, drag: { x: false, y: false } }, legend: { show: false },
      scales: { x: { time: true }, y: { range: (_, low, high) => [0, Math.max(high || 0, 1) * 1.08] } },
      axes: [
        { ...axis, size: 20, space: 70, values: [[60, "{HH}:{mm}"], [1, "{HH}:{mm}:{ss}"]] },
        { ...axis, size: 38, space: 26, values: (_, ticks) => ticks.map(kind.unit) },
      ],
      series: [{}, ...kind.series.map((_, index) => ({
        stroke: color(index ? "--c2" : "--c1"), width: 1.5, points: { show: false }, spanGaps: false,
        fill: index ? undefined : `color-mix(in srgb, ${color("--c1")} 12%, transparent)`,
      }))],
      hooks: { setCursor: [(self) => tell(place, kind, self.cursor.idx)] },
    }, columns(kind), place);
    charts.push({ place, kind, plot });
    tell(place, kind, null);
  }

  function tell(place, kind, index) {
    const head = place.parentElement.querySelector("figcaption");
    let shown = head.querySelector("b");
    if (!shown) shown = head.appendChild(document.createElement("b"));
    const point = points[index ?? points.length - 1];
    shown.textContent = point ? kind.last(point) : "";
  }

  function redraw() {
    for (const { plot } of charts.splice(0)) plot.destroy();
    const places = $$(".chart");
    for (const place of places) {
      if (points.length > 1) { place.replaceChildren(); draw(place); }
      else if (!place.firstChild) {
        const none = document.createElement("span");
        none.className = "none";
        none.textContent = "collecting…";
        place.append(none);
      }
    }
  }

  function add(point) {
    if (!$(".chart") || !point || (points.length && point[0] <= points[points.length - 1][0])) return;
    points.push(point);
    if (points.length > MOST) points.shift();
    if (!charts.length) return redraw();
    for (const { place, kind, plot } of charts) {
      plot.setData(columns(kind));
      tell(place, kind, plot.cursor.idx ?? null);
    }
  }

  const sparks = new Map();
  function spark(canvas) {
    const past = sparks.get(canvas.dataset.spark) || [];
    const pen = canvas.getContext("2d"), scale = devicePixelRatio || 1, width = 120, height = 22;
    if (canvas.width !== width * scale) { canvas.width = width * scale; canvas.height = height * scale; }
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    if (past.length < 2) return;
    const top = Math.max(...past, 1);
    pen.beginPath();
    past.forEach((value, at) => pen.lineTo((at / (past.length - 1)) * width, height - 2 - (value / top) * (height - 4)));
    pen.strokeStyle = color("--c1");
    pen.lineWidth = 1.25;
    pen.stroke();
    pen.lineTo(width, height); pen.lineTo(0, height);
    pen.globalAlpha = .12; pen.fillStyle = color("--c1"); pen.fill(); pen.globalAlpha = 1;
  }
  const sparkAll = () => $$("canvas[data-spark]").forEach(spark);

  // -- live

  const busy = () => document.hidden || $("dialog[open]") || live.contains(document.activeElement) && /^(INPUT|SELECT)$/.test(document.activeElement.tagName) && document.activeElement.type !== "checkbox";
  let leaving = false;
  const again = () => { if (!leaving) htmx.trigger(live, "again"); };
  let pulse;

  function looked(told) {
    $("#trouble").hidden = !told.trouble;
    $("#trouble").textContent = told.trouble;
    const dot = $("#pulse");
    dot.className = `pulse ${told.trouble ? "off" : "on"}`;
    clearTimeout(pulse);
    requestAnimationFrame(() => dot.classList.add("beat"));
    pulse = setTimeout(() => { dot.className = "pulse off"; }, 20000);
    campaigns(told.campaigns);
    if (told.point) {
      badges(told.counts);
      const scope = $(".charts")?.dataset.queue;
      add(scope ? (told.queues[scope] || [])[0] : told.point);
      for (const [name, last] of Object.entries(told.queues)) {
        if (!last.length) continue;
        const past = sparks.get(name) || sparks.set(name, []).get(name);
        past.push(last[0][1]);
        if (past.length > 120) past.shift();
      }
    }
    if (!busy()) again();
  }

  function badges(values) {
    for (const badge of $$("[data-count]")) {
      const value = values[badge.dataset.count];
      badge.hidden = !value;
      badge.textContent = count(value);
      badge.classList.toggle("hot", ["dead", "notices"].includes(badge.dataset.count) && value > 0);
    }
  }

  function campaigns(list) {
    const place = $("#campaigns");
    place.replaceChildren(...list.map((each) => {
      const row = document.createElement("div");
      row.className = `campaign ${each.state}`;
      const name = document.createElement("b");
      name.textContent = each.title;
      const sum = document.createElement("span");
      sum.className = "sum";
      const parts = [`${each.done.toLocaleString("en")}${each.expected ? ` of ${each.expected.toLocaleString("en")}` : ""} done`];
      if (each.rate) parts.push(`at most ${each.rate}/s`);
      if (each.gone) parts.push(`${each.gone} had moved on`);
      if (each.refused) parts.push(`${each.refused} refused`);
      if (each.trouble) parts.push(each.trouble);
      parts.push(each.state === "running" ? `by ${each.who}` : each.state);
      sum.textContent = parts.join(" · ");
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.do = each.state === "running" ? "stop" : "dismiss";
      button.dataset.id = each.id;
      button.textContent = each.state === "running" ? "Stop" : "Dismiss";
      row.append(name);
      if (each.state === "running" && each.expected) {
        const bar = document.createElement("progress");
        bar.max = each.expected; bar.value = each.done + each.gone + each.refused;
        row.append(bar);
      }
      row.append(sum, button);
      return row;
    }));
  }

  // -- acting

  // What does something of its own with a click, with Enter and with space.
  const CONTROLS = "a, button, input, label, details";

  function toast(text, bad) {
    if (!text) return;
    const box = document.createElement("div");
    box.className = bad ? "toast bad" : "toast";
    box.textContent = text;
    $("#toasts").append(box);
    setTimeout(() => box.remove(), bad ? 12000 : 5000);
  }

  function confirmed(button) {
    const dialog = $("#confirm"), asks = (button.dataset.ask || "").split(" ");
    $("#confirm-title").textContent = button.dataset.confirm;
    $("#confirm-text").textContent = button.dataset.text || "";
    for (const name of ["rate", "reason", "force"]) $(`#confirm-${name}`).hidden = !asks.includes(name);
    const yes = $("#confirm-yes");
    yes.textContent = button.textContent.replace("…", "").trim();
    yes.classList.toggle("danger", button.classList.contains("danger"));
    dialog.returnValue = "no";
    dialog.showModal();
    if (!button.classList.contains("danger")) yes.focus();
    return new Promise((resolve) => dialog.addEventListener("close", () => {
      const form = $("form", dialog), more = {};
      if (asks.includes("rate")) more.rate = form.elements.rate.value;
      if (asks.includes("reason")) more.reason = form.elements.reason.value;
      if (asks.includes("force") && form.elements.force.checked) more.force = "yes";
      form.elements.force.checked = false;
      resolve(dialog.returnValue === "yes" ? more : null);
    }, { once: true }));
  }

  async function act(button) {
    const listing = button.closest("[data-listing]");
    const form = new URLSearchParams();
    for (const name of ["queue", "place", "worker", "what", "kind", "search", "reason", "idle", "id", "name", "group"]) {
      if (button.dataset[name]) form.append(name, button.dataset[name]);
    }
    if ("rows" in button.dataset) {
      for (const box of $$('input[name="row"]:checked', listing)) form.append("row", box.value);
      if (!form.has("row")) return toast("Nothing is ticked", true);
    }
    if (button.dataset.with) for (const box of $$("input, select, textarea", button.closest(button.dataset.with))) form.set(box.name, box.value);
    if (button.dataset.confirm) {
      const more = await confirmed(button);
      if (!more) return;
      for (const [name, value] of Object.entries(more)) if (value) form.set(name, value);
    }
    button.disabled = true;
    const leave = button.dataset.leave || listing?.dataset.leave;
    leaving = Boolean(leave); // what the page shows may be gone before the answer is here: nothing to refresh
    try {
      const answer = await fetch(`${root}/do/${button.dataset.do}`, {
        method: "POST", body: form, credentials: "same-origin",
        headers: { "X-CSRF-Token": meta("csrf"), "Content-Type": "application/x-www-form-urlencoded" },
      });
      const type = answer.headers.get("content-type") || "";
      const told = type.includes("json") ? await answer.json() : { ok: false, message: (await answer.text()).slice(0, 300) };
      toast(told.message, !told.ok);
      if (told.ok && leave) return void setTimeout(() => location.assign(leave), 700);
      if (told.ok && "rows" in button.dataset) {
        $$("input:checked", listing).forEach((box) => { box.checked = false; });
      }
    } catch {
      toast("The dashboard does not answer", true);
    } finally {
      button.disabled = false;
      picked();
    }
    leaving = false;
    again();
  }

  function picked() {
    for (const bar of $$("[data-bar]")) {
      const boxes = $$('input[name="row"]', bar.closest("[data-listing]"));
      const ticked = boxes.filter((box) => box.checked).length;
      $("[data-picked]", bar).textContent = ticked ? `${ticked} ticked` : "nothing ticked";
      $$("[data-rows]", bar).forEach((button) => { button.disabled = !ticked; });
      const all = $("[data-all]", bar.closest("[data-listing]"));
      if (all) { all.checked = ticked > 0 && ticked === boxes.length; all.indeterminate = ticked > 0 && ticked < boxes.length; }
    }
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-do]");
    if (button) { event.preventDefault(); return void act(button); }
    const row = event.target.closest("tr[data-open]");
    if (row && !event.target.closest(CONTROLS) && !String(getSelection())) {
      if (event.target.closest(".tick")) { const box = $('input[name="row"]', row); box.checked = !box.checked; return picked(); }
      if (event.metaKey || event.ctrlKey) window.open(row.dataset.open, "_blank", "noopener");
      else location.assign(row.dataset.open);
    }
  });
  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-all]")) {
      $$('input[name="row"]', event.target.closest("[data-listing]")).forEach((box) => { box.checked = event.target.checked; });
    }
    if (event.target.matches('[data-all], input[name="row"]')) picked();
    if (event.target.matches(".filter select")) event.target.form.requestSubmit();
  });
  document.addEventListener("submit", (event) => {
    if (event.target.matches("[data-listing]")) event.preventDefault();
    if (event.target.matches(".filter")) $$("input, select", event.target).forEach((field) => { field.disabled = !field.value; });
  });

  // -- keys

  let going = 0, place = "";
  function marked() {
    $$("#live tbody tr[data-open]").forEach((row) => row.classList.toggle("at", row.dataset.open === place));
  }
  function step(by) {
    const rows = $$("#live tbody tr[data-open]");
    if (!rows.length) return;
    const at = rows.findIndex((row) => row.classList.contains("at"));
    const next = rows[Math.max(0, Math.min(rows.length - 1, at < 0 ? 0 : at + by))];
    place = next.dataset.open;
    marked();
    next.focus({ preventScroll: true });
    next.scrollIntoView({ block: "nearest" });
  }
  document.addEventListener("keydown", (event) => {
    if (event.metaKey || event.ctrlKey || event.altKey || $("dialog[open]")) return;
    const typing = event.target.matches("input:not([type=checkbox]), select, textarea");
    if (event.key === "Escape" && typing) return event.target.blur();
    if (typing) return;
    if (WAYS[event.key] && nodeOf(event.target)) { event.preventDefault(); return wander(event.target, WAYS[event.key]); }
    const row = $("#live tr.at");
    if (going && Date.now() - going < 1500) {
      going = 0;
      const target = $(`nav a[data-key="${CSS.escape(event.key)}"]`);
      if (target) { event.preventDefault(); return target.click(); }
    }
    const keys = {
      g: () => { going = Date.now(); },
      "/": () => ($("[data-search]") || $(".filter input"))?.focus(),
      j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
      Enter: () => location.assign(row.dataset.open),
      " ": () => { const box = $('input[name="row"]', row); if (box) { box.checked = !box.checked; picked(); } },
      a: () => $("[data-all]")?.click(),
      t: () => $("#theme").click(),
      "?": () => $("#keys").showModal(),
    };
    const run = keys[event.key];
    if (!run || (["Enter", " "].includes(event.key) && (!row || event.target.closest(CONTROLS)))) return;
    if (["ArrowDown", "ArrowUp"].includes(event.key) && !$("#live tbody tr[data-open]")) return;
    event.preventDefault();
    run();
  });

  // -- the graph of a flow: a line from each node to those after it, and arrow keys

  const graph = () => $("[data-graph]");
  const nodeOf = (element) => element?.closest?.("[data-graph] .node");
  function lines() {
    if (!graph()) return;
    const svg = $("svg", graph()), origin = svg.getBoundingClientRect(), found = [], box = (id) => document.getElementById(id)?.getBoundingClientRect();
    for (const node of $$("[data-after]:not([data-after=''])", graph())) {
      for (const word of node.dataset.after.split(" ")) {
        const [number, condition] = word.split(":"), from = box(`n${number}`);
        if (from) found.push({ condition, from, to: node.getBoundingClientRect(), ends: [`n${number}`, node.id] });
      }
    }
    // Lines of one node begin, and end, side by side, in the order in which they go apart.
    const spread = (end, own, other) => {
      const groups = new Map();
      for (const line of found) (groups.get(line.ends[end]) || groups.set(line.ends[end], []).get(line.ends[end])).push(line);
      for (const group of groups.values()) {
        group.sort((a, b) => a[other].left + a[other].width / 2 - b[other].left - b[other].width / 2);
        group.forEach((line, at) => { line[`x${end}`] = line[own].left - origin.left + line[own].width * (0.2 + 0.6 * (at + 0.5) / group.length); });
      }
    };
    spread(0, "from", "to");
    spread(1, "to", "from");
    svg.replaceChildren(...found.map((line) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      const top = line.from.bottom - origin.top, low = line.to.top - origin.top, bend = Math.max(14, (low - top) / 2);
      path.setAttribute("d", `M${line.x0} ${top}C${line.x0} ${top + bend} ${line.x1} ${low - bend} ${line.x1} ${low}`);
      path.setAttribute("class", line.condition);
      path.dataset.ends = line.ends.join(" ");
      return path;
    }));
    light(nodeOf(document.activeElement) || $(".node:hover", graph()));
  }
  function light(node) {
    if (!graph()) return;
    graph().classList.toggle("lit", !!node);
    const near = new Set();
    for (const path of $$("path", graph())) {
      const ends = path.dataset.ends.split(" "), on = !!node && ends.includes(node.id);
      path.classList.toggle("on", on);
      if (on) ends.forEach((each) => near.add(each));
    }
    for (const each of $$(".node", graph())) each.classList.toggle("near", near.has(each.id));
  }
  // One of its links is in the order of the tab key: the one that was reached last.
  function reach() {
    const links = graph() ? $$("a", graph()) : [], at = links.includes(document.activeElement) ? document.activeElement : links[0];
    for (const link of links) link.tabIndex = link === at ? 0 : -1;
  }
  const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  function wander(link, [right, down]) {
    const centre = (element) => { const box = element.getBoundingClientRect(); return [box.left + box.width / 2, box.top + box.height / 2]; };
    const [x, y] = centre(link), links = $$("a", graph());
    let best = null, least = Infinity;
    for (const each of links) {
      const [ex, ey] = centre(each), ahead = (ex - x) * right + (ey - y) * down, aside = Math.abs((ex - x) * down) + Math.abs((ey - y) * right);
      if (ahead > 2 && (down || aside < 8) && ahead + 2 * aside < least) { best = each; least = ahead + 2 * aside; }
    }
    best ||= down ? null : links[links.indexOf(link) + right];
    if (best) { best.focus({ preventScroll: true }); best.scrollIntoView({ block: "nearest" }); }
  }
  document.addEventListener("pointerover", (event) => light(nodeOf(event.target)));
  document.addEventListener("focusin", (event) => { light(nodeOf(event.target)); reach(); });
  document.addEventListener("focusout", (event) => { if (!event.relatedTarget) light(null); });

  // -- the output of a job, as it comes: text, and nothing else

  const KEPT = 200000;
  function watch(place) {
    const box = $("pre", place), state = $("[data-state]", place), source = new EventSource(place.dataset.output);
    const say = (words) => { state.textContent = words; };
    const add = (text) => {
      const low = box.scrollHeight - box.scrollTop - box.clientHeight < 30;
      box.append(text);
      if (box.textContent.length > KEPT) box.textContent = box.textContent.slice(-KEPT / 2);
      if (low) box.scrollTop = box.scrollHeight;
    };
    box.hidden = false;
    say("waiting for output…");
    source.addEventListener("output", (event) => {
      const told = JSON.parse(event.data);
      if (told.restart) add("\n— it started over —\n");
      if (told.missed) add(`\n— ${told.missed} chunks are gone —\n`);
      add(told.chunk);
      say(`attempt ${told.attempt}, live`);
    });
    source.addEventListener("end", () => { source.close(); say(box.textContent ? "the job has ended" : "the job has ended, and nothing of its output is kept"); });
    source.addEventListener("trouble", (event) => { source.close(); say(JSON.parse(event.data).message); });
    source.addEventListener("error", () => { if (source.readyState !== EventSource.CLOSED) say("connecting again…"); });
    addEventListener("pagehide", () => source.close());
  }
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-watch]");
    if (!button) return;
    button.hidden = true;
    watch(button.closest("[data-output]"));
  });

  // -- theme

  $("#theme").addEventListener("click", () => {
    const page = document.documentElement;
    const dark = page.dataset.theme ? page.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    page.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("streamworker-theme", page.dataset.theme); } catch { /* storage may be off */ }
    redraw();
    sparkAll();
  });
  $("#help").addEventListener("click", () => $("#keys").showModal());

  // -- begin

  document.addEventListener("look", (event) => looked(JSON.parse(event.detail.data)));
  document.addEventListener("htmx:sse:error", () => { $("#pulse").className = "pulse off"; });
  document.addEventListener("htmx:after:swap", () => { picked(); marked(); sparkAll(); lines(); reach(); });
  addEventListener("resize", () => { for (const { place, plot } of charts) plot.setSize({ width: place.clientWidth, height: place.clientHeight }); });
  addEventListener("resize", lines);

  picked();
  lines();
  reach();
  if ($(".chart")) {
    const scope = $(".charts").dataset.queue;
    redraw();
    fetch(`${root}/points${scope ? `?queue=${encodeURIComponent(scope)}` : ""}`, { credentials: "same-origin" })
      .then((answer) => answer.ok ? answer.json() : [])
      .then((past) => { points = past; redraw(); });
  }
})();
