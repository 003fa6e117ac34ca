"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("runs").textContent);
  const histogram = JSON.parse(document.getElementById("histogram").textContent);
  const place = document.getElementById("charts");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colours = ["--c1", "--c2", "--c3", "--c4", "--c5"];
  const plots = [];
  let zoom = null; // [first, last] update that is looked at
  const losses = runs.flatMap((run) => [...run.updates.smooth, ...run.evaluations.eval_loss]).filter((value) => value !== null);
  let logarithmic = Math.min(...losses) > 0 && Math.max(...losses) > 20 * Math.min(...losses); // else the end is a flat line

  const short = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e9) return (value / 1e9).toPrecision(3) + " G";
    if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
    if (size >= 1e4) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 1e-3) return value.toExponential(1);
    return String(Number(value.toPrecision(4)));
  };

  // Columns of several series with steps of their own, on one axis of all steps.
  const aligned = (series) => {
    const steps = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
    const at = new Map(steps.map((step, index) => [step, index]));
    const columns = series.map((one) => {
      const column = new Array(steps.length).fill(undefined);
      one.x.forEach((step, index) => { column[at.get(step)] = one.y[index]; });
      return column;
    });
    return [steps, ...columns];
  };

  // A line at every finding, with its name.
  const marks = (plot) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.font = `${11 * devicePixelRatio}px system-ui`;
    runs[0].findings.forEach((finding, index) => {
      const x = plot.valToPos(finding.step, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) return;
      ctx.strokeStyle = ctx.fillStyle = css(finding.severity === "error" ? "--bad" : "--warn");
      ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      const right = x > bbox.left + bbox.width * 0.7;
      ctx.textAlign = right ? "right" : "left";
      ctx.fillText(finding.id.replaceAll("_", " "), x + (right ? -4 : 4), bbox.top + (14 + 14 * (index % 4)) * devicePixelRatio);
    });
    ctx.restore();
  };

  // Held-out points with a bar of one standard error to each side.
  const bars = (errors) => (plot) => {
    const { ctx } = plot;
    ctx.save();
    errors.forEach((one) => {
      ctx.strokeStyle = css(one.colour); ctx.lineWidth = 1.5 * devicePixelRatio;
      one.x.forEach((step, index) => {
        const error = one.errors[index];
        if (error === null || one.y[index] === null) return;
        const x = plot.valToPos(step, "x", true);
        const low = plot.valToPos(Math.max(one.y[index] - error, 1e-9), "y", true);
        const high = plot.valToPos(one.y[index] + error, "y", true);
        if (![x, low, high].every(Number.isFinite)) return;
        ctx.beginPath(); ctx.moveTo(x, low); ctx.lineTo(x, high); ctx.stroke();
      });
    });
    ctx.restore();
  };

  const axis = () => ({ stroke: css("--dim"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui" });

  let fresh = true;
  const draw = (title, series, { wide = false, scale = false, errors = [] } = {}) => {
    if (!series.length) return;
    const known = fresh ? null : plots.find((one) => one.title === title);
    if (known && known.names === series.map((one) => one.name).join()) { // the same curves, longer
      known.errors = errors;
      known.plot.setData(aligned(series), zoom === null);
      if (zoom) known.plot.redraw();
      return;
    }
    const box = document.createElement("div");
    box.className = wide ? "chart wide" : "chart";
    box.setAttribute("role", "img");
    const last = series[0].y.filter((value) => value !== null && value !== undefined).at(-1);
    box.setAttribute("aria-label", `${title} over updates; the last value is ${short(last)}`);
    const head = document.createElement("h3");
    head.textContent = title;
    box.append(head);
    place.append(box);
    const log = scale && logarithmic && series.every((one) => one.y.every((value) => value === null || value === undefined || value > 0));
    const options = {
      width: Math.max(box.clientWidth - 16, 240), height: wide ? 320 : 200,
      cursor: { sync: { key: "welltuned" }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: log ? { distr: 3 } : {} },
      axes: [axis(), { ...axis(), size: 64, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick))) }],
      series: [{ label: "update" }, ...series.map((one) => ({
        label: one.name, stroke: css(one.colour), width: one.width ?? 2, spanGaps: true,
        points: { show: one.points ?? false, size: 7 }, value: (_, value) => short(value),
      }))],
      hooks: {
        draw: scale ? [marks, (plot) => bars(entry.errors)(plot)] : [],
        setSelect: [(plot) => {
          if (plot.select.width > 0) zoom = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
        }],
      },
    };
    const entry = { box, title, names: series.map((one) => one.name).join(), log, errors };
    entry.plot = new uPlot(options, aligned(series), box);
    entry.plot.over.addEventListener("dblclick", () => { zoom = null; });
    if (zoom) entry.plot.setScale("x", { min: zoom[0], max: zoom[1] });
    plots.push(entry);
  };

  const label = (run, what) => (runs.length > 1 ? `${run.name}: ${what}` : what);
  const colour = (index, offset = 0) => colours[(runs.length > 1 ? index : offset) % colours.length];

  const all = (again = true) => {
    fresh = again === true || again instanceof Event;
    if (fresh) plots.splice(0).forEach(({ plot, box }) => { plot.destroy(); box.remove(); });
    const loss = [], errors = [];
    runs.forEach((run, index) => {
      const { updates, evaluations } = run;
      if (runs.length === 1) loss.push({ name: "training loss", x: updates.step, y: updates.loss, colour: "--faint", width: 1 });
      loss.push({ name: label(run, "training, smoothed"), x: updates.step, y: updates.smooth, colour: colour(index), width: runs.length > 1 ? 1 : 2 });
      if (evaluations.step.length) {
        const shade = runs.length > 1 ? colour(index) : "--c2";
        loss.push({ name: label(run, "held out"), x: evaluations.step, y: evaluations.eval_loss, colour: shade, points: true });
        errors.push({ x: evaluations.step, y: evaluations.eval_loss, errors: evaluations.eval_loss_se, colour: shade });
      }
    });
    draw("loss", loss, { wide: true, scale: true, errors });
    const names = new Map([["learning_rate", "learning rate"], ["grad_norm", "gradient norm"], ["tokens_per_second", "tokens a second"], ["memory_bytes", "memory, bytes"], ["weight_change", "weights changed by, relative"]]);
    const columns = new Set(runs.flatMap((run) => Object.keys(run.updates)).filter((name) => !["step", "loss", "smooth"].includes(name)));
    const judged = new Set(runs.flatMap((run) => Object.keys(run.evaluations)).filter((name) => !["step", "eval_loss", "eval_loss_se"].includes(name)));
    for (const name of [...columns, ...[...judged].filter((one) => !columns.has(one))]) {
      const series = runs.flatMap((run, index) => {
        const found = [];
        if (run.updates[name]) found.push({ name: label(run, names.get(name) ?? name), x: run.updates.step, y: run.updates[name], colour: colour(index), width: 1.5 });
        if (run.evaluations[name]) found.push({ name: label(run, name), x: run.evaluations.step, y: run.evaluations[name], colour: colour(index, 1), points: true });
        return found;
      });
      draw(names.get(name) ?? name, series, { scale: false });
    }
    if (fresh) lengths();
  };

  const lengths = () => {
    const box = document.getElementById("lengths");
    if (!box || !histogram.length) return;
    box.replaceChildren();
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", `Rows by length: ${histogram.map((bin) => `${bin.rows} of ${bin.from} to ${bin.to} tokens`).join(", ")}`);
    const head = document.createElement("h3");
    head.textContent = "tokens of a row";
    box.append(head);
    const options = {
      width: Math.max(box.clientWidth - 16, 240), height: 160, legend: { show: false }, cursor: { show: false },
      scales: { x: { time: false, range: [-0.6, histogram.length - 0.4] }, y: { range: (_, low, high) => [0, Math.max(high, 1)] } },
      axes: [{ ...axis(), splits: () => histogram.map((_, index) => index), values: () => histogram.map((bin) => String(bin.from)) }, { ...axis(), size: 56 }],
      series: [{}, { label: "rows", stroke: css("--c1"), fill: css("--faint"), paths: uPlot.paths.bars({ size: [0.9, 100] }), points: { show: false } }],
    };
    const plot = new uPlot(options, [histogram.map((_, index) => index), histogram.map((bin) => bin.rows)], box);
    plots.push({ box: { remove() { box.replaceChildren(); } }, plot, title: "tokens of a row" });
  };

  document.getElementById("scale").checked = logarithmic;
  document.getElementById("scale").addEventListener("change", (event) => { logarithmic = event.target.checked; all(); });
  document.getElementById("theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    all();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(all, 150); });
  all();

  // A page that is served hears of what is new. Everything is text: nothing that a run says becomes an element.
  const { events } = document.body.dataset;
  if (!events) return;
  const put = (id, text) => { document.getElementById(id).textContent = text; };
  let running = false;
  const { key, name } = document.body.dataset;
  const act = async (what, body) => {
    const answer = await fetch(`/api/${what}`, { method: "POST", headers: { "content-type": "application/json", "x-welltuned-key": key }, body: JSON.stringify({ name, ...body }) });
    return answer.json();
  };
  if (key) {
    for (const what of ["stop", "resume"]) {
      document.getElementById(what).addEventListener("click", async () => {
        put("answer", "…");
        const found = await act(what, {});
        put("answer", found.error ?? (what === "stop" ? "it saves, then ends" : "it goes on"));
        if (what === "resume" && !found.error) setTimeout(() => location.reload(), 4000);
      });
    }
    document.getElementById("ask")?.addEventListener("submit", async (event) => {
      event.preventDefault();
      const said = new FormData(event.target);
      put("base", "…"); put("tuned", "…");
      const found = await act("chat", { prompt: said.get("prompt"), system: said.get("system") });
      put("base", found.error ?? found.base ?? ""); put("tuned", found.error ?? found.reply ?? "");
    });
  }
  const source = new EventSource(events);
  source.onmessage = (message) => {
    const now = JSON.parse(message.data);
    if (now.finished && running) { location.reload(); return; }
    running = !now.finished;
    runs[0] = now.curves;
    all(false);
    put("sentence", now.sentence);
    put("health", now.health[1]);
    document.getElementById("health").className = `health ${now.health[0]}`;
    document.getElementById("progress").value = now.done;
    put("state", now.state);
    if (key) {
      document.getElementById("stop").hidden = !now.running;
      document.getElementById("resume").hidden = now.running || now.finished;
    }
    const log = document.getElementById("log");
    log.replaceChildren(...now.log.map((text) => { const item = document.createElement("li"); item.textContent = text; return item; }));
    if (now.finished) source.close();
  };
  source.onerror = () => put("state", "not connected: trying again");
})();
