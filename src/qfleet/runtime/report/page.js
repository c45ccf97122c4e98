"use strict";
// Draws the report from the data in the page, and again whenever `draw` is called with newer data.
const NUM_COLOURS = 8;
const AXES_OF_RUNS = { env_steps: "Environment steps", wall_seconds: "Wall time, seconds" };
let axes = AXES_OF_RUNS;
let axis = "env_steps";
let shown = null;

const element = (tag, attributes = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null));
  return made;
};
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (number) => css(`--s${number % NUM_COLOURS}`);
const faint = (hex, share) => hex + Math.round(share * 255).toString(16).padStart(2, "0");

const STYLES = {
  line: (c) => ({ mode: "lines", line: { color: c, width: 2.25 } }),
  faint: (c) => ({ mode: "lines", line: { color: faint(c, 0.55), width: 1.25 } }),
  seed: (c) => ({ mode: "lines", line: { color: faint(c, 0.3), width: 1 }, showlegend: false }),
  points: (c) => ({ mode: "markers", marker: { color: c, size: 7 }, line: {} }),
  steps: (c) => ({ mode: "lines", line: { color: c, width: 2, shape: "hv" } }),
  area: (c) => ({ mode: "lines", line: { color: c, width: 0.5 }, stackgroup: "parts", fillcolor: faint(c, 0.6) }),
};

function plotlyTraces(trace) {
  const data = trace.data[axis], c = colour(trace.colour), dash = trace.colour < NUM_COLOURS ? "solid" : "dash";
  if (trace.style === "band") {
    const edge = { x: data.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
    return [{ ...edge, y: data.low }, { ...edge, y: data.high, fill: "tonexty", fillcolor: faint(c, 0.2), name: trace.name }];
  }
  const style = STYLES[trace.style](c);
  if (data.x.length === 1) style.mode = "markers";
  style.line.dash = dash;
  return [{ x: data.x, y: data.y, name: trace.name, ...style }];
}

function layout(figure) {
  const many = (figure.traces || []).filter((trace) => trace.style !== "seed" && trace.style !== "band").length > 1;
  const line = { gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"), automargin: true };
  return {
    autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, color: css("--dim"), size: 12 },
    margin: { l: 50, r: 12, t: 8, b: 38 }, showlegend: many,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 11.5, color: css("--ink") } },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { color: css("--ink") } },
    xaxis: { ...line, title: { text: figure.kind === "bars" ? figure.unit : axes[axis], standoff: 6 } },
    yaxis: figure.kind === "bars" ? { ...line, autorange: "reversed" } :
      { ...line, title: { text: figure.unit, standoff: 6 }, type: isLog(figure) ? "log" : "-" },
  };
}

// A logarithmic axis can't show values that aren't positive.
const isLog = (figure) => figure.log && figure.traces.every((trace) =>
  ["y", "low"].every((name) => (trace.data[axis][name] || []).every((y) => y === null || y > 0)));

// One axis beside the other, with a line for each trial. Positions on the axes are in [0, 1].
function drawParallel(figure, plot) {
  const axes = figure.coordinates, last = axes.length - 1, best = figure.lines.length && figure.lines[0].name;
  const traces = [...figure.lines].reverse().map((line) => ({
    x: axes.map((_, i) => i), y: line.y, name: line.name, mode: "lines+markers", marker: { size: 5 },
    line: line.name === best ? { color: colour(1), width: 3 } : { color: faint(colour(0), 0.12 + 0.7 * line.share), width: 1.5 },
    text: line.text.map((text, i) => `${axes[i].name} ${text}`), hovertemplate: "%{text}<extra>%{fullData.name}</extra>",
  }));
  const label = (x, y, text, bold) => ({ x, y, text: bold ? `<b>${text}</b>` : text, showarrow: false,
    font: { size: 11, color: css(bold ? "--ink" : "--dim") }, bgcolor: bold ? undefined : faint(css("--card"), 0.8),
    xanchor: bold ? "center" : x === last ? "left" : "right", xshift: bold ? 0 : x === last ? 8 : -8 });
  const hidden = { showgrid: false, zeroline: false, showticklabels: false, fixedrange: true };
  const all = { ...layout({ traces: [], unit: "" }), showlegend: false, margin: { l: 70, r: 70, t: 12, b: 12 },
    xaxis: { ...hidden, range: [-0.05, last + 0.05] }, yaxis: { ...hidden, range: [-0.05, 1.15] },
    shapes: axes.map((_, i) => ({ type: "line", x0: i, x1: i, y0: 0, y1: 1, line: { color: css("--line"), width: 1.5 } })),
    annotations: axes.flatMap((axis, i) => [label(i, 1.1, axis.name, true),
      ...axis.ticks.map(([y, text]) => label(i, y, text, false))]) };
  return Plotly.react(plot, traces, all, { displaylogo: false, responsive: true, displayModeBar: false });
}

function drawFigure(figure, plot) {
  if (figure.kind === "parallel") return drawParallel(figure, plot);
  const bars = figure.kind === "bars" ? [{
    type: "bar", orientation: "h", x: figure.bars.map((bar) => bar.value), y: figure.bars.map((bar) => bar.name),
    marker: { color: figure.bars.map((bar, number) => colour(number)) }, hovertemplate: figure.hover || "%{x:.1f} s<extra></extra>",
  }] : [...figure.traces].sort((a, b) => (b.style === "faint") - (a.style === "faint")).flatMap(plotlyTraces);
  return Plotly.react(plot, bars, layout(figure), { displaylogo: false, responsive: true, displayModeBar: false });
}

function table(rows, columns, classes = "") {
  if (!rows.length) return null;
  const head = columns && element("tr", {}, ...columns.map((column) => element("th", {}, column)));
  const body = rows.map((row) => element("tr", {}, ...row.map((cell, i) =>
    element(i || columns ? "td" : "th", {}, cell))));
  return element("div", { class: `table ${classes}` }, element("table", {}, ...(head ? [head] : []), ...body));
}

function records(rows, classes) {
  return rows.length ? table(rows.map(Object.values), Object.keys(rows[0]), classes) : null;
}

function section(title, ...content) {
  const there = content.filter((each) => each !== null);
  return there.length ? [element("h2", {}, title), ...there] : [];
}

function folded(title, content, isOpen = false) {
  if (content === null) return null;
  const made = element("details", isOpen ? { open: "" } : {}, element("summary", {}, title), content);
  made.dataset.name = title;
  return made;
}

function axisSwitch() {
  if (Object.keys(axes).length < 2) return null;
  const made = element("div", { class: "switch", role: "group", "aria-label": "x axis of the curves" });
  for (const [name, title] of Object.entries(axes)) {
    const button = element("button", { type: "button", "aria-pressed": String(name === axis) }, title.split(",")[0]);
    button.addEventListener("click", () => { axis = name; draw(shown); });
    made.append(button);
  }
  return made;
}

function groupCells(row, number) {
  const swatch = element("span", { class: "swatch", style: `background: ${colour(number)}` });
  return Object.values(row).map((cell, i) => (i ? cell : element("span", {}, swatch, cell)));
}

function findings(list) {
  return table(list.map((each) => [each.name, each.text, each.figure, each.threshold, each.knob]),
    ["finding", "what", "figure", "threshold", "what to change"]);
}

// Draws all of the page, and resolves once every figure is drawn.
async function draw(report) {
  shown = report;
  axes = report.axes || AXES_OF_RUNS;
  if (!(axis in axes)) axis = Object.keys(axes)[0];
  const facts = report.facts, old = document.getElementById("report");
  const open = new Set([...old.querySelectorAll("details[open]")].map((each) => each.dataset.name));
  document.title = facts.title;
  document.getElementById("title").textContent = facts.title;
  document.getElementById("subtitle").replaceChildren(facts.subtitle,
    ...(facts.state ? [" · ", element("span", { class: "state" }, facts.state)] : []));
  const plots = report.figures.map((figure) => {
    const plot = element("div", { class: "plot", id: `plot-${figure.id}` });
    const caption = element("figcaption", {}, element("h3", {}, figure.title), element("p", {}, figure.note));
    return { figure, plot, box: element("figure", figure.wide ? { class: "wide" } : {}, caption, plot) };
  });
  const video = report.video && element("video",
    { controls: "", loop: "", autoplay: "", playsinline: "", src: report.video, title: "an episode of the trained agent" });
  if (video) video.muted = true; // otherwise the browser wouldn't start it
  const groups = facts.groups.length > 0 &&
    table(facts.groups.map(groupCells), Object.keys(facts.groups[0]), "many");
  const made = element("main", { id: "report" },
    facts.cards.length ? element("div", { class: "cards" }, ...facts.cards.map(([name, value]) =>
      element("div", { class: "card" }, element("b", {}, value), element("span", {}, name)))) : null,
    facts.notes.length ? element("ul", { class: "notes" }, ...facts.notes.map((note) => element("li", {}, note))) : null,
    ...section("Settings compared", groups || null, records(facts.differences)),
    element("div", { class: "bar" }, element("h2", {}, facts.figures_title || "Curves"), axisSwitch() || ""),
    plots.length ? element("div", { class: "figures" }, ...plots.map((each) => each.box)) :
      element("p", { class: "dim" }, "There are no records to draw yet."),
    ...section("What may be wrong", (report.findings || []).length ? findings(report.findings) : null),
    ...section("The agent", video || null),
    ...section(facts.runs_title || "Runs", records(facts.runs, "many")),
    ...section("Details",
      folded("Settings", table(facts.settings)),
      folded("Versions and hardware", table(facts.environment)),
      folded("Summary", table(facts.summary))));
  made.querySelectorAll("details").forEach((each) => { each.open = open.has(each.dataset.name); });
  old.replaceWith(made);
  await Promise.all(plots.map((each) => drawFigure(each.figure, each.plot)));
  document.documentElement.dataset.drawn = String(plots.length);
}

// plotly.js is in the page as compressed text, so that the page is a third of the size.
async function unpackPlotly() {
  const packed = document.getElementById("plotly");
  if (packed === null) return;
  const bytes = Uint8Array.from(atob(packed.textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = element("script", {}, await new Response(stream).text());
  packed.remove();
  document.head.append(script);
}

async function begin() {
  try {
    await unpackPlotly();
    const report = JSON.parse(document.getElementById("data").textContent);
    if (report !== null) await draw(report); // the dashboard sends it later
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => shown && draw(shown));
  } catch (error) {
    document.getElementById("loading")?.replaceChildren(`The report can't be drawn: ${error}`);
    throw error;
  }
}

const begun = begin();
