"use strict";
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const DASHES = ["solid", "dash", "dashdot", "dot", "longdash", "longdashdot", "5px,2px"];
const MARKERS = {2: ["circle", "square", "triangle-up"], 3: ["circle", "square", "diamond", "cross"]};
const CONFIG = {responsive: true, displayModeBar: false, scrollZoom: false};  // the bar has buttons that lead elsewhere
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;  // there a drag scrolls the page

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const ofGroup = (label) => numbers.styles[label] % numbers.colours;
const dashOf = (label) => {  // where colours come again, they come with other dashes
  const place = numbers.styles[label];
  return DASHES[(place + Math.floor(place / numbers.colours)) % DASHES.length];
};
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");  // plotly reads tags in texts
const shown = (value, scale) =>
  value === null ? "none" : scale === "percent" ? `${+(100 * value).toPrecision(4)}%` : `${+value.toPrecision(3)}`;
const find = (selector) => document.querySelector(selector);

/* Panels: each is drawn again when what it depends on changes. */
const painters = new Map(), zoomed = new Set();

function panel(parent, title, draw) {
  const figure = document.createElement("figure"), caption = document.createElement("figcaption");
  const plot = document.createElement("div"), more = document.createElement("small");
  plot.className = "plot";
  plot.setAttribute("role", "img");
  caption.append(title, more);
  figure.append(caption, plot);
  parent.append(figure);
  painters.set(plot, () => {
    const {traces, layout, label, note} = draw();
    plot.setAttribute("aria-label", label);
    more.textContent = note;
    const drawn = Plotly.react(plot, traces, {...base(), ...layout}, CONFIG);
    if (!zoomed.has(plot)) {
      zoomed.add(plot);
      plot.on("plotly_relayout", (change) => tickAgain(plot, change));
    }
    return drawn;
  });
  return plot;
}

const paint = (parent) => { for (const [plot, draw] of painters) if (parent.contains(plot)) draw(); };

function base() {
  return {
    font: {color: colour("ink"), size: 12, family: "system-ui, sans-serif"}, paper_bgcolor: colour("paper"),
    plot_bgcolor: colour("paper"), margin: {l: 52, r: 10, t: 10, b: 34}, showlegend: false,
    dragmode: touch ? false : "zoom",
    hoverlabel: {bgcolor: colour("raised"), bordercolor: colour("edge"), font: {color: colour("ink")}},
  };
}

/* Metrics over epochs. */
const hidden = new Set();

function course(name) {
  const {label, formula, scale, atCollapse} = numbers.metrics[name], split = find("#split").value;
  const there = Object.entries(numbers.courses[split][name] ?? {}).filter(([group]) => !hidden.has(group));
  const all = there.flatMap(([, of]) => [...of.mean, ...(of.least ?? []), ...(of.greatest ?? [])]);
  const values = all.filter((value) => value !== null), least = Math.min(...values), greatest = Math.max(...values);
  const logarithmic = scale === "log" && least > 0 && greatest > 3 * least;
  const traces = there.flatMap(([group, of]) => lines(group, of, scale));
  const epochs = there.flatMap(([, of]) => of.epochs).sort((one, two) => one - two);
  const axis = {gridcolor: colour("grid"), zeroline: false, linecolor: colour("edge"), automargin: true};
  const percent = {tickformat: ".4~%"};
  const collapsed = atCollapse !== null && !(logarithmic && atCollapse <= 0);
  const ends = there.map(([group, of]) => `${group} ${shown(of.mean.at(-1), scale)} at epoch ${of.epochs.at(-1)}`);
  return {
    traces, note: `${name}: ${formula}`,
    label: `Line chart of ${label} (${name}), ${split} split, over epochs. ` +
      (ends.length ? `It ends with ${ends.join("; ")}.` : "Not measured on this split.") +
      (atCollapse === null ? "" : ` At collapse it is ${shown(atCollapse, scale)}.`),
    layout: {
      hovermode: "x unified",
      xaxis: {...axis, title: {text: "epoch", standoff: 4}, ...wholeTicks(epochs.at(0), epochs.at(-1))},
      yaxis: {
        ...axis, nticks: 6, ...(scale === "percent" ? percent : {exponentformat: "power"}),
        ...(logarithmic ? {type: "log", ...ticks(least, greatest)} : {}),
      },
      shapes: !collapsed ? [] : [{
        type: "line", xref: "paper", x0: 0, x1: 1, y0: atCollapse, y1: atCollapse,
        line: {color: colour("soft"), width: 1, dash: "dot"},
      }],
      annotations: ends.length ? [] : [{
        text: "not measured on this split", showarrow: false, xref: "paper", yref: "paper", x: .5, y: .5,
      }],
    },
  };
}

/** Ticks at whole numbers, about six of them at most. */
function wholeTicks(first = 0, last = 1) {
  const least = Math.max(1, Math.abs(last - first) / 6), power = 10 ** Math.floor(Math.log10(least));
  const dtick = [1, 2, 5, 10].map((head) => head * power).find((step) => step >= least);
  return {tickmode: "linear", tick0: 0, dtick, tickformat: "d"};
}

/** After zooming, as many ticks as there is room for. */
function tickAgain(plot, change) {
  const update = {};
  for (const name of ["xaxis", "yaxis"]) {
    const axis = plot.layout[name];
    if (axis?.tickmode !== "linear" || !Object.keys(change).some((key) => key.startsWith(name))) continue;
    const {dtick} = wholeTicks(...axis.range);
    if (dtick !== axis.dtick) update[`${name}.dtick`] = dtick;
  }
  if (Object.keys(update).length) Plotly.relayout(plot, update);
}

/** Ticks of a logarithmic axis: decades alone where there are many, else some values between them. */
function ticks(least, greatest) {
  const decades = Math.log10(greatest / least), heads = decades > 2.5 ? [1] : decades > 1.3 ? [1, 3] : [1, 2, 5];
  const step = Math.ceil(decades / 6), values = [];
  for (let power = Math.floor(Math.log10(least)); power <= Math.log10(greatest); power += step) {
    values.push(...heads.map((head) => +`${head}e${power}`));
  }
  return {tickvals: values, ticktext: values.map((value) => `${value}`)};
}

function lines(group, {epochs, mean, least, greatest}, scale) {
  const color = colour(`c${ofGroup(group)}`), edge = {x: epochs, mode: "lines", line: {width: 0}, hoverinfo: "skip"};
  const form = scale === "percent" ? ".2%" : ".3~g";
  const range = least ? ` (%{customdata[0]:${form}} to %{customdata[1]:${form}})` : "";
  return [
    ...(least ? [{...edge, y: least}, {...edge, y: greatest, fill: "tonexty", fillcolor: `${color}2e`}] : []),
    {
      x: epochs, y: mean, name: plain(group), mode: epochs.length > 1 ? "lines" : "markers",
      line: {color, dash: dashOf(group), width: 2}, marker: {color, size: 8},
      customdata: least && least.map((value, place) => [value, greatest[place]]),
      hovertemplate: `%{y:${form}}${range}`,
    },
  ];
}

function courses() {
  const split = find("#split"), groups = find("#groups"), section = find("#courses");
  for (const name of Object.keys(numbers.courses)) split.append(new Option(name));
  for (const group of Object.keys(numbers.styles)) groups.append(choice(group));
  for (const name of new Set([...numbers.headline, ...Object.keys(numbers.metrics)])) {
    const parent = find(numbers.headline.includes(name) ? "#courses .headline" : "#courses .others");
    panel(parent, `${numbers.metrics[name].label} `, () => course(name));
  }
  const again = () => {
    paint(find("#courses .headline"));
    if (section.querySelector("details").open) paint(find("#courses .others"));
  };
  split.addEventListener("change", again);
  section.querySelector("details").addEventListener("toggle", again);
  groups.addEventListener("change", ({target}) => {
    target.checked ? hidden.delete(target.value) : hidden.add(target.value);
    again();
  });
}

function choice(group) {
  const label = document.createElement("label"), box = document.createElement("input");
  Object.assign(box, {type: "checkbox", checked: true, value: group});
  const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const dashes = {solid: "", dash: "8 4", dashdot: "8 3 2 3", dot: "2 3", longdash: "12 4", longdashdot: "12 3 2 3"};
  for (const [name, value] of [["width", 34], ["height", 10], ["aria-hidden", "true"]]) line.setAttribute(name, value);
  line.innerHTML = `<path d="M0 5H34" stroke="var(--c${ofGroup(group)})" stroke-width="3" ` +
    `stroke-dasharray="${dashes[dashOf(group)] ?? "5 2"}"/>`;
  label.append(box, line, group);
  return label;
}

/* Cosines of classes. */
function cosines() {
  const {ideal, spread, matrices, words} = numbers.cosines;
  find("#cosines .words").textContent = words;
  for (const [group, of] of Object.entries(matrices)) {
    const pair = document.createElement("div");
    pair.className = "pair square";
    find("#cosines .panels").append(pair);
    for (const [rows, matrix] of Object.entries(of)) {
      panel(pair, `${group}: ${rows} `, () => heat(group, rows, matrix, ideal, spread));
    }
  }
}

function heat(group, rows, matrix, ideal, spread) {
  const values = matrix.flat().filter((value) => value !== null);
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const [least, greatest] = [Math.min(...values), Math.max(...values)];
  const axis = {showgrid: false, zeroline: false, constrain: "domain", ticks: "", ...wholeTicks(0, matrix.length)};
  const range = values.length ? `from ${shown(least)} to ${shown(greatest)}, mean ${shown(mean)}` : "none: all are zero";
  return {
    note: range,
    label: `Heat map of the cosines between the ${rows} of ${matrix.length} classes, ${group}: ${range}; ` +
      `those of a simplex ETF are ${shown(ideal)}.`,
    traces: [{
      type: "heatmap", z: matrix, colorscale: "Cividis", zmin: ideal - spread, zmax: ideal + spread,
      hovertemplate: "classes %{y} and %{x}: %{z:.3f}<extra></extra>", hoverongaps: false,
      colorbar: {
        orientation: "h", thickness: 8, len: 1, y: -.08, yanchor: "top", outlinewidth: 0, tickfont: {size: 10}, nticks: 5,
      },
    }],
    layout: {
      margin: {l: 30, r: 4, t: 6, b: 56},
      xaxis: axis, yaxis: {...axis, autorange: "reversed", scaleanchor: "x", constraintoward: "top"},
    },
  };
}

/* Class means, classifier rows and features on the simplex of a few classes. */
const AXES = ["x", "y", "z"];
const along = (places) => Object.fromEntries(places.map((values, axis) => [AXES[axis], values]));

/** What moves, as plotly's coordinates: for each class its features, its classifier row from the centre, its mean. */
function moving({features, weights, means}) {
  return features.flatMap((places, one) => [
    along(places), along(weights.map((values) => [0, values[one]])), along(means.map((values) => [values[one]])),
  ]);
}

function scene(group, frame) {
  const {classes, vertices, reach, frames} = numbers.motion, at = frames[group][frame];
  const solid = vertices.length === 3, type = solid ? "scatter3d" : "scatter";
  const outline = {
    ...along(vertices.map((values) => edges(classes.length).map((corner) => corner === null ? null : values[corner]))),
    type, mode: "lines", hoverinfo: "skip", line: {color: colour("soft"), width: solid ? 2 : 1, dash: "dot"},
  };
  const places = moving(at);
  const traces = classes.flatMap((one, place) => {
    const color = colour(`c${place}`), symbol = MARKERS[vertices.length][place];
    const looks = [
      {mode: "markers", name: `class ${one}`, marker: {color, symbol, size: solid ? 3 : 6, opacity: .5}},
      {mode: "lines", name: `classifier row ${one}`, line: {color, width: solid ? 6 : 3}},
      {mode: "markers", name: `mean of class ${one}`,
        marker: {color, symbol, size: solid ? 8 : 14, line: {color: colour("ink"), width: 1.5}}},
    ];
    return looks.map((look, kind) => ({
      type, ...look, ...places[3 * place + kind], hovertemplate: `${look.name}<extra></extra>`,
    }));
  });
  const axis = {range: [-reach, reach], visible: false, fixedrange: false};
  const flat = {margin: {l: 0, r: 0, t: 0, b: 0}, xaxis: axis, yaxis: {...axis, scaleanchor: "x"}};
  const box = {xaxis: axis, yaxis: axis, zaxis: axis, aspectmode: "cube", camera: {eye: {x: .85, y: .75, z: .4}}};
  return {
    traces: [outline, ...traces], ...told(group, frame),
    layout: solid ? {...flat, scene: box, uirevision: "kept"} : {...flat, uirevision: "kept"},
  };
}

function edges(corners) {
  const path = [];
  for (let one = 0; one < corners; one++) for (let two = one + 1; two < corners; two++) path.push(one, two, null);
  return path;
}

function told(group, frame) {
  const {classes, frames} = numbers.motion, {epoch, accuracy, nc1, means} = frames[group][frame];
  const values = `train accuracy ${shown(accuracy, "percent")}, tr Σ_W / tr Σ_B ${shown(nc1)}`;
  const note = `epoch ${epoch}: ${values}${means[0][0] === null ? "; class means all equal, no simplex is near" : ""}`;
  return {note, label: `Features, means and classifier rows of classes ${classes.join(", ")}, ${group}; ${note}`};
}

function motion() {
  const words = find("#motion .words");
  if (numbers.motion === null) {
    words.textContent = "Two classes lie on a line: there is no plane to show.";
    return;
  }
  const {classes, epochs, vertices, frames} = numbers.motion, slider = find("#frame"), play = find("#play");
  words.textContent = numbers.motion.words;
  find("#motion .controls").hidden = false;
  slider.max = epochs.length - 1;
  play.disabled = epochs.length < 2;
  const plots = Object.keys(frames).map((group) => {
    return [group, panel(find("#motion .panels"), `${group} `, () => scene(group, +slider.value))];
  });
  const traces = Array.from({length: 3 * classes.length}, (_, place) => place + 1);
  const say = () => {
    find("#epoch").textContent = epochs[+slider.value];
    slider.setAttribute("aria-valuetext", `epoch ${epochs[+slider.value]}`);
  };
  const show = () => {
    say();
    for (const [group, plot] of plots) {
      const places = moving(frames[group][+slider.value]), {note, label} = told(group, +slider.value);
      const axes = AXES.slice(0, vertices.length);
      Plotly.restyle(plot, Object.fromEntries(axes.map((axis) => [axis, places.map((one) => one[axis])])), traces);
      plot.setAttribute("aria-label", label);
      plot.parentElement.querySelector("small").textContent = note;
    }
  };
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
  const step = () => {
    slider.value = +slider.value + 1;
    show();
    if (slider.value === slider.max) stop();
  };
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (slider.value === slider.max) { slider.value = 0; show(); }
    play.textContent = "Pause";
    timer = setInterval(step, calm.matches ? 1000 : 250);
  });
  slider.addEventListener("input", () => { stop(); show(); });
  say();  // a browser may keep where the slider stood
}

motion();
courses();
cosines();
const everything = () => {
  for (const id of ["#motion", "#courses .headline", "#cosines"]) paint(find(id));
  if (find("#courses details").open) paint(find("#courses .others"));
};
dark.addEventListener("change", everything);
everything();
