"use strict";
// A search: held-out loss over the learning rate with the curve that chose, and every arm as it trained.
const arms = (() => {
  const { plots, css, colours, short, axis, stepAxis, valueAxis, aligned, legend, box, bars, withBars, lines, logScale } = charts;
  const MOST_GROUPS = 6;
  const percent = (share) => `${Math.round(100 * share)} %`;

  const lowest = ({ best, factor }, judged) => {
    if (!best || !factor) return "";
    const where = `${short(Number(best.toPrecision(2)))} ×/÷ ${factor.toFixed(2)}`;
    const beyond = best > Math.max(...judged.map((arm) => arm.rate)) * 1.2 || best < Math.min(...judged.map((arm) => arm.rate)) / 1.2;
    return beyond ? ` Its lowest point lies beyond the arms, at about ${where}.` : ` Shaded: where its lowest point lies, ${where}.`;
  };

  // What is to be said where the parabola, which has what the advice knew in it, misses the points.
  const misfit = ({ fitted, fitted_share: share }, judged) => {
    const points = judged.flatMap((arm) => arm.looks.filter((look) => look.share === share).map((look) => ({ rate: arm.rate, ...look })));
    const off = points.filter((point) => {
      const after = fitted.findIndex((one) => one.rate >= point.rate);
      if (after < 1) return false;
      const [a, b] = [fitted[after - 1], fitted[after]];
      const part = Math.log(point.rate / a.rate) / Math.log(b.rate / a.rate);
      return Math.abs(point.loss - a.loss - part * (b.loss - a.loss)) > 2 * Math.hypot(point.error ?? 0, (a.high - a.low) / 2);
    });
    return off.length ? ` ${off.length} of ${points.length} points lie off it by more than two errors: the points are what was measured.` : "";
  };

  // Held-out loss over the rate. What was compared last is shown; the other looks can be: they are on another scale.
  const rates = (search, place) => {
    const judged = search.arms.filter((arm) => arm.rate !== null && arm.looks.length);
    const shares = [...new Set(judged.flatMap((arm) => arm.looks.map((look) => look.share)))].sort((a, b) => a - b);
    if (!judged.length || new Set(judged.map((arm) => arm.rate)).size < 2) return;
    const several = shares.filter((share) => judged.filter((arm) => arm.looks.some((look) => look.share === share)).length > 1);
    const first = search.fitted_share ?? several.at(-1) ?? shares.at(-1);
    const found = [...new Set(judged.map((arm) => arm.group))];
    const groups = found.length > MOST_GROUPS ? [null] : found; // of more, each has a colour that another has too
    const series = [], errors = [];
    if (search.fitted.length) {
      const x = search.fitted.map((point) => point.rate);
      for (const [name, key] of [["", "low"], ["", "high"], ["fitted parabola", "loss"]]) {
        series.push({ name, x, y: search.fitted.map((point) => point[key]), colour: "--c3", width: name ? 2 : 0, hidden: !name });
      }
    }
    groups.forEach((group, of) => shares.forEach((share) => {
      const points = judged.filter((arm) => group === null || arm.group === group).flatMap((arm) => arm.looks.filter((look) => look.share === share).map((look) => ({ rate: arm.rate, ...look }))).sort((a, b) => a.rate - b.rate);
      if (!points.length) return;
      const colour = groups.length > 1 ? colours[of % colours.length] : share === first ? "--c2" : colours[(3 + shares.indexOf(share)) % colours.length];
      const one = { name: `${group ? `${group}, ` : ""}after ${percent(share)}`, x: points.map((point) => point.rate), y: points.map((point) => point.loss), colour, width: 0, points: true, show: share === first };
      const at = series.push(one);
      errors.push({ ...one, errors: points.map((point) => point.error), shown: (plot) => plot.series[at].show });
    }));
    const marks = [
      search.advised && { x: search.advised, name: `advice ${short(search.advised)}`, colour: "--dim" },
      ...judged.filter((arm) => arm.chosen).map((arm) => ({ x: arm.rate, name: `chosen ${short(arm.rate)}`, colour: "--good" })),
    ].filter(Boolean);
    const title = `held-out loss over the learning rate, after ${percent(first)} of each run`;
    const told = judged.map((arm) => `${arm.name}: ${short(arm.looks.at(-1).loss)}${arm.chosen ? ", chosen" : ""}`).join("; ");
    const made = box(place, title, `${title}. ${told}`, true);
    const ticks = judged.map((arm) => arm.rate).sort((a, b) => a - b).filter((rate, index, all) => index === 0 || rate / all[index - 1] > 1.2);
    const shade = (plot) => { // where the lowest point lies, with one standard deviation
      if (!search.best || !search.factor) return;
      const { ctx, bbox } = plot;
      const [left, right] = [search.best / search.factor, search.best * search.factor].map((rate) => Math.min(Math.max(plot.valToPos(rate, "x", true), bbox.left), bbox.left + bbox.width));
      ctx.save();
      ctx.globalAlpha = 0.14; ctx.fillStyle = css("--good");
      ctx.fillRect(left, bbox.top, right - left, bbox.height);
      ctx.restore();
    };
    const options = {
      width: Math.max(made.clientWidth - 16, 240), height: 340,
      cursor: { drag: { x: false, y: false } },
      scales: { x: { time: false, distr: 3, range: (_, low, high) => [low / 1.25, high * 1.25] }, y: { range: (plot, low, high) => withBars(plot, errors, low, high) } },
      axes: [{ ...axis(), splits: () => ticks, filter: (_, all) => all, values: (_, all) => all.map(short) }, valueAxis()],
      series: [{ label: "rate", value: (_, value) => short(value) }, ...series.map((one) => ({
        label: one.name, stroke: one.width || one.points ? css(one.colour) : undefined, width: one.width, spanGaps: true, show: one.show ?? true,
        points: { show: one.points ?? false, size: 8, fill: css(one.colour) }, value: one.points ? (_, value) => short(value) : legend,
      }))],
      bands: search.fitted.length ? [{ series: [2, 1], fill: css("--band") }] : [],
      hooks: { drawClear: [shade], draw: [(plot) => bars(plot, errors), (plot) => lines(plot, marks)] },
    };
    const plot = new uPlot(options, aligned(series), made);
    series.forEach((one, index) => { if (one.hidden) made.querySelectorAll(".u-legend .u-series")[index + 1].hidden = true; });
    const note = document.createElement("p");
    note.className = "note";
    note.textContent = `Bars: one standard error of the distance to the best arm, paired row by row.${search.fitted.length ? " Band: one standard deviation of the fitted parabola." : ""}${lowest(search, judged)}${misfit(search, judged)}`;
    made.append(note);
    plots.push({ made, plot, title });
  };

  // Each arm's training loss until it ended, with its looks as points.
  const courses = (search, place, logarithmic) => {
    const begun = search.arms.filter((arm) => arm.step.length);
    if (!begun.length) return;
    const series = [];
    begun.forEach((arm, index) => {
      const colour = colours[index % colours.length];
      const fate = arm.chosen ? ", chosen" : arm.status === "alive" || arm.status === "done" ? "" : `, ${arm.status}`;
      series.push({ name: `${arm.name}${fate}`, x: arm.step, y: arm.smooth, colour, width: arm.chosen ? 3 : 1.5 });
      const looks = arm.looks.map((look) => ({ step: Math.max(1, Math.round(look.share * search.updates)), loss: look.loss }));
      series.push({ name: "", x: looks.map((look) => look.step), y: looks.map((look) => look.loss), colour, width: 0, points: true });
    });
    const title = "training loss of each arm, smoothed; points: its held-out loss";
    const made = box(place, title, `${title}: ${series.filter((one) => one.name).map((one) => one.name).join("; ")}`, true);
    const options = {
      width: Math.max(made.clientWidth - 16, 240), height: 300,
      scales: { x: { time: false }, y: logarithmic ? logScale : {} },
      axes: [stepAxis(), valueAxis()],
      series: [{ label: "update", value: (plot, value, _, at) => short(at === null ? plot.data[0].at(-1) : value) }, ...series.map((one) => ({
        label: one.name, stroke: css(one.colour), width: one.width, spanGaps: true,
        points: { show: one.points ?? false, size: 7, fill: css(one.colour) }, value: legend,
      }))],
    };
    const plot = new uPlot(options, aligned(series), made);
    series.forEach((one, index) => { if (!one.name) made.querySelectorAll(".u-legend .u-series")[index + 1].hidden = true; });
    plots.push({ made, plot, title });
  };

  return (search, logarithmic) => {
    rates(search, document.getElementById("rates"));
    courses(search, document.getElementById("courses"), logarithmic);
  };
})();
