"use strict";
// The curves of a run, or of several laid over each other.
const run = (() => {
  const { plots, css, colours, short, axis, stepAxis, valueAxis, aligned, legend, box, bars, withBars, lines, logScale } = charts;
  const runs = JSON.parse(document.getElementById("runs").textContent);
  const histogram = JSON.parse(document.getElementById("histogram").textContent);
  const place = document.getElementById("charts");
  const more = document.getElementById("more");
  let zoom = null; // [first, last] update that is looked at
  const grpo = runs.every((one) => one.method === "grpo");

  // Title, columns and their names; `wide` ones come first, `noisy` ones are smoothed, `bars` have the held-out error.
  const LAYOUT = [
    ...(grpo ? [{ title: "reward", of: ["reward"], wide: true, noisy: true, bars: true, findings: true }] : []),
    { title: "loss", of: ["loss"], wide: !grpo, noisy: true, bars: !grpo, findings: !grpo, scale: true, more: grpo },
    { title: "accuracy: chosen is likelier, share", of: ["rewards/accuracies"], noisy: true, share: true },
    { title: "margin, chosen less rejected", of: ["rewards/margins"], noisy: true },
    { title: "implicit reward of both", of: ["rewards/chosen", "rewards/rejected"], names: ["chosen", "rejected"] },
    { title: "log-probability of both", of: ["logps/chosen", "logps/rejected"], names: ["chosen", "rejected"] },
    { title: "each reward", like: /^rewards\/(.+)\/mean$/ },
    { title: "length of answers, tokens", of: ["completions/mean_length"] },
    { title: "share of answers cut off", of: ["completions/clipped_ratio"], share: true },
    { title: "KL divergence from the start", of: ["kl"] },
    { title: "entropy, nats a token", of: ["entropy"] },
    { title: "spread of rewards within a group", of: ["reward_std"] },
    { title: "share of groups without signal", of: ["frac_reward_zero_std"], share: true },
    { title: "learning rate", of: ["learning_rate"] },
    { title: "gradient norm", of: ["grad_norm"] },
    { title: "tokens a second", of: ["tokens_per_second"] },
    { title: "memory, GB", of: ["memory_bytes"], unit: 1e9 },
    { title: "weights changed by, relative", of: ["weight_change"] },
    { title: "seconds of an update", of: ["seconds/generation", "seconds/reward", "seconds/update"], names: ["sampling", "rewards", "update"], more: true },
    { title: "share of tokens clipped", of: ["clip_ratio"], more: true },
    { title: "rewards that failed", of: ["reward_faults"], more: true },
  ];

  // The layout for what these runs have; a column that it does not know has a chart of its own below.
  const laid = () => {
    const held = new Set(runs.flatMap((one) => Object.keys(one.evaluations)).map((name) => name.replace("eval_", "")));
    const known = new Set([...runs.flatMap((one) => Object.keys(one.updates)), ...held]);
    ["step", "loss_se", "reward_se"].forEach((name) => known.delete(name));
    const found = [];
    for (const one of LAYOUT) {
      const columns = one.like ? [...known].filter((name) => one.like.test(name)) : one.of.filter((name) => known.has(name));
      columns.forEach((name) => known.delete(name));
      const names = one.like ? columns.map((name) => name.match(one.like)[1]) : (one.names ?? columns.map(() => ""));
      if (columns.length) found.push({ ...one, columns, names });
    }
    return [...found, ...[...known].map((name) => ({ title: name.replaceAll("_", " "), columns: [name], names: [""], more: true }))];
  };

  const several = runs.length > 1;
  // Series of a chart: what was trained, smoothed where it is noisy, and what was held out, for each run and column.
  const seriesOf = (chart) => {
    const series = [], errors = [];
    const unit = chart.unit ?? 1;
    const scaled = (column) => (unit === 1 ? column : column.map((value) => (value === null ? null : value / unit)));
    runs.forEach((one, index) => chart.columns.forEach((name, at) => {
      const shade = several ? colours[index % colours.length] : colours[at % colours.length];
      const said = [several ? one.name : "", chart.names[at]].filter(Boolean).join(", ");
      const label = (what) => [said, what].filter(Boolean).join(": ");
      const { updates, evaluations, smooth } = one;
      const dash = several && at > 0 ? [6, 4] : undefined;
      if (updates[name]) {
        const noisy = chart.noisy && smooth[name];
        if (!several || !noisy) series.push({ name: label(noisy ? "each update" : said ? "" : "value"), x: updates.step, y: scaled(updates[name]), colour: noisy ? "--faint" : shade, width: noisy ? 1 : 1.6, dash });
        if (noisy) series.push({ name: label("training, smoothed"), x: updates.step, y: smooth[name], colour: shade, width: 2, dash });
      }
      const minus = grpo && name === "loss"; // of what is held out it is the reward with a minus, which has a chart
      const judged = minus ? undefined : evaluations[`eval_${name}`] ?? (chart.bars && name === "reward" ? evaluations.eval_loss?.map((value) => (value === null ? null : -value)) : undefined);
      if (!judged?.some((value) => value !== null)) return;
      const colour = several ? shade : chart.columns.length > 1 ? shade : "--c2";
      const held = { name: label(grpo ? "held out, greedy" : "held out"), x: evaluations.step, y: scaled(judged), colour, width: 1.6, points: true, dash: [2, 3] };
      series.push(held);
      if (chart.bars && evaluations.eval_loss_se) errors.push({ ...held, errors: evaluations.eval_loss_se });
    }));
    return { series, errors };
  };

  const findings = () => runs[0].findings.map((one) => ({ x: one.step, name: one.id.replaceAll("_", " "), colour: one.severity === "error" ? "--bad" : "--warn" }));

  const draw = (chart, fresh, logarithmic) => {
    const { series, errors } = seriesOf(chart);
    if (!series.some((one) => one.x.length)) return;
    const names = series.map((one) => one.name).join("|");
    const known = fresh ? null : plots.find((one) => one.title === chart.title);
    if (known && known.names === names) { // the same curves, longer
      known.errors = errors;
      known.plot.setData(aligned(series), zoom === null);
      if (zoom) known.plot.redraw();
      return;
    }
    if (known) { known.plot.destroy(); known.made.remove(); plots.splice(plots.indexOf(known), 1); }
    const last = series[0].y.findLast((value) => value !== null && value !== undefined);
    const made = box(chart.more ? more : place, chart.title, `${chart.title} over updates; the last value is ${short(last)}`, chart.wide);
    const log = chart.scale && logarithmic && series.every((one) => one.y.every((value) => value === null || value === undefined || value > 0));
    const entry = { made, title: chart.title, names, errors };
    const options = {
      width: Math.max(made.clientWidth - 16, 240), height: chart.wide ? 320 : 170,
      cursor: { sync: { key: "welltuned" }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: log ? logScale : chart.share ? { range: [-0.03, 1.03] } : { range: (plot, low, high) => withBars(plot, entry.errors, low, high) } },
      axes: [stepAxis(), valueAxis()],
      series: [{ label: "update", value: (plot, value, _, at) => short(at === null ? plot.data[0].at(-1) : value) }, ...series.map((one) => ({
        label: one.name, stroke: css(one.colour), width: one.width, spanGaps: true, dash: one.dash,
        points: { show: one.points ?? one.x.length < 3, size: 7, fill: css(one.colour) }, value: legend,
      }))],
      hooks: {
        draw: [...(chart.findings ? [(plot) => lines(plot, findings())] : []), ...(chart.bars ? [(plot) => bars(plot, entry.errors)] : [])],
        setSelect: [(plot) => {
          if (plot.select.width > 0) zoom = [plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")];
        }],
      },
    };
    const plot = entry.plot = new uPlot(options, aligned(series), made);
    plot.over.addEventListener("dblclick", () => { zoom = null; });
    if (zoom) plot.setScale("x", { min: zoom[0], max: zoom[1] });
    plots.push(entry);
  };

  const lengths = () => {
    const at = document.getElementById("lengths");
    if (!at || !histogram.length) return;
    at.replaceChildren();
    at.setAttribute("role", "img");
    at.setAttribute("aria-label", `Rows by length: ${histogram.map((bin) => `${bin.rows} of ${bin.from} to ${bin.to} tokens`).join(", ")}`);
    const head = document.createElement("h3");
    head.textContent = "rows by their length in tokens";
    at.append(head);
    const options = {
      width: Math.max(at.clientWidth - 16, 240), height: 160, legend: { show: false }, cursor: { show: false },
      scales: { x: { time: false, range: [-0.6, histogram.length - 0.4] }, y: { range: (_, low, high) => [0, Math.max(high, 1)] } },
      axes: [{ ...axis(), splits: () => histogram.map((_, index) => index), values: () => histogram.map((bin) => short(bin.from)) }, valueAxis()],
      series: [{}, { label: "rows", stroke: css("--c1"), fill: css("--faint"), paths: uPlot.paths.bars({ size: [0.9, 100] }), points: { show: false } }],
    };
    const plot = new uPlot(options, [histogram.map((_, index) => index), histogram.map((bin) => bin.rows)], at);
    plots.push({ made: { remove() { at.replaceChildren(); } }, plot, title: "lengths" });
  };

  const scale = document.getElementById("scale");
  const losses = runs.flatMap((one) => [...(one.smooth.loss ?? []), ...one.evaluations.eval_loss]).filter((value) => value !== null);
  scale.checked = losses.length > 0 && Math.min(...losses) > 0 && Math.max(...losses) > 20 * Math.min(...losses); // else the end is a flat line

  // All charts, anew or with what is new in them.
  const all = (fresh = true) => {
    if (fresh) charts.clear();
    const found = laid();
    document.getElementById("nothing").hidden = runs.some((one) => one.updates.step.length || one.evaluations.step.length);
    more.parentElement.hidden = !found.some((chart) => chart.more);
    found.filter((chart) => !chart.more || more.parentElement.open).forEach((chart) => draw(chart, fresh, scale.checked));
    if (runs[0].search && document.getElementById("rates")) {
      if (!fresh) plots.filter((one) => one.made.parentElement?.id === "rates" || one.made.parentElement?.id === "courses").forEach((one) => { one.plot.destroy(); one.made.remove(); plots.splice(plots.indexOf(one), 1); });
      arms(runs[0].search, scale.checked);
    }
    if (fresh) lengths();
  };

  scale.addEventListener("change", () => all());
  more.parentElement.addEventListener("toggle", () => all(false));
  addEventListener("theme", () => all());
  let waiting, width = innerWidth;
  addEventListener("resize", () => { // the height alone changes where a telephone hides its bars
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(all, 150);
  });
  for (const [event, printing] of [["beforeprint", true], ["afterprint", false]]) { // charts are as wide as paper then
    addEventListener(event, () => { document.body.classList.toggle("printing", printing); all(); });
  }
  all();
  return { update(now) { runs[0] = now; all(false); } };
})();
