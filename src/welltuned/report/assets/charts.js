"use strict";
// Charts as all of our pages draw them: one look, one way to say numbers, one cursor over charts of the same axis.
const charts = (() => {
  const plots = [];
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colours = ["--c1", "--c2", "--c3", "--c4", "--c5", "--c6"];

  const short = (value) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size >= 1e9) return (value / 1e9).toPrecision(3) + " G";
    if (size >= 1e6) return (value / 1e6).toPrecision(3) + " M";
    if (size >= 1e4) return Math.round(value).toLocaleString("en");
    if (size !== 0 && size < 1e-2) return value.toExponential(1).replace(".0e", "e");
    return String(Number(value.toPrecision(4)));
  };

  const WHOLE = [1, 2, 5].flatMap((first) => [...Array(10).keys()].map((power) => first * 10 ** power)).sort((a, b) => a - b);
  const axis = () => ({ size: 34, stroke: css("--dim"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line"), width: 1 }, font: "12px system-ui" });

  const stepAxis = () => ({ ...axis(), incrs: WHOLE }); // there is no half update

  // Columns of several series with places of their own, on one axis of all places.
  const aligned = (series) => {
    const places = [...new Set(series.flatMap((one) => one.x))].sort((a, b) => a - b);
    const at = new Map(places.map((place, index) => [place, index]));
    const columns = series.map((one) => {
      const column = new Array(places.length).fill(undefined);
      one.x.forEach((place, index) => { column[at.get(place)] = one.y[index]; });
      return column;
    });
    return [places, ...columns];
  };

  // In a legend: the value under the cursor; without one the last.
  const legend = (plot, value, index, at) => short(at === null ? plot.data[index].findLast((one) => one !== null && one !== undefined) : value);

  const box = (place, title, said, wide) => {
    const made = document.createElement("div");
    made.className = wide ? "chart wide" : "chart";
    made.setAttribute("role", "img");
    made.setAttribute("aria-label", said);
    const head = document.createElement("h3");
    head.textContent = title;
    made.append(head);
    place.append(made);
    return made;
  };

  // Points with a bar of one standard error to each side.
  const bars = (plot, errors) => {
    const { ctx } = plot;
    ctx.save();
    for (const one of errors) {
      if (one.shown && !one.shown(plot)) continue;
      ctx.strokeStyle = css(one.colour); ctx.lineWidth = 1.5 * devicePixelRatio;
      one.x.forEach((place, index) => {
        const error = one.errors[index];
        if (!error || one.y[index] === null) return;
        const x = plot.valToPos(place, "x", true);
        const low = plot.valToPos(Math.max(one.y[index] - error, plot.scales.y.distr === 3 ? 1e-9 : -Infinity), "y", true);
        const high = plot.valToPos(one.y[index] + error, "y", true);
        if (![x, low, high].every(Number.isFinite) || x < plot.bbox.left - 1 || x > plot.bbox.left + plot.bbox.width + 1) return;
        const cap = 3 * devicePixelRatio;
        ctx.beginPath();
        ctx.moveTo(x, low); ctx.lineTo(x, high);
        ctx.moveTo(x - cap, low); ctx.lineTo(x + cap, low);
        ctx.moveTo(x - cap, high); ctx.lineTo(x + cap, high);
        ctx.stroke();
      });
    }
    ctx.restore();
  };

  // The range of values with their bars, as far as they are looked at.
  const withBars = (plot, errors, low, high) => {
    if (low === null || high === null) return [low, high];
    const [min, max] = [plot.scales.x.min ?? -Infinity, plot.scales.x.max ?? Infinity];
    for (const one of errors.filter(({ shown }) => !shown || shown(plot))) {
      one.x.forEach((place, index) => {
        const [value, error] = [one.y[index], one.errors[index]];
        if (place < min || place > max || value === null || !error) return;
        [low, high] = [Math.min(low, value - error), Math.max(high, value + error)];
      });
    }
    return uPlot.rangeNum(low, high, 0.1, true);
  };

  // A dashed line at each place, with its name beside it.
  const lines = (plot, marks) => {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.font = `${11 * devicePixelRatio}px system-ui`;
    marks.forEach((mark, index) => {
      const x = plot.valToPos(mark.x, "x", true);
      if (!(x >= bbox.left && x <= bbox.left + bbox.width)) return;
      ctx.strokeStyle = ctx.fillStyle = css(mark.colour);
      ctx.setLineDash([4 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.beginPath(); ctx.moveTo(x, bbox.top); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      const right = x > bbox.left + bbox.width * 0.7;
      ctx.textAlign = right ? "right" : "left";
      ctx.fillText(mark.name, x + (right ? -4 : 4) * devicePixelRatio, bbox.top + (14 + 14 * (index % 4)) * devicePixelRatio);
    });
    ctx.restore();
  };

  const logScale = { distr: 3, range: (_, low, high) => (low > 0 && high > low ? [low / 1.15, high * 1.15] : uPlot.rangeLog(low || 1e-3, high || 1, 10, true)) };

  // Room for what the axis says, whatever its length.
  const side = (plot, values) => {
    const longest = (values ?? []).reduce((most, text) => Math.max(most, String(text).length), 0);
    return Math.max(42, 16 + 7 * longest);
  };
  const valueAxis = (format = short) => ({ ...axis(), size: side, values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : format(tick))) });

  const clear = () => plots.splice(0).forEach(({ plot, made }) => { plot.destroy(); made.remove(); });

  return { plots, css, colours, short, axis, stepAxis, valueAxis, aligned, legend, box, bars, withBars, lines, logScale, clear };
})();
