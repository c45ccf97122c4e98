// Chooses runs from the dashboard's list, and draws their report again as metrics arrive.
const LEAST_WAIT = 2000; // ms between two looks at the runs
const chosen = new Set(new URLSearchParams(location.search).getAll("run"));
let drawnText = "";

const list = element("nav", { id: "runs", "aria-label": "runs" });
document.querySelector("header").after(list);

async function get(path) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`the dashboard answered ${answer.status}`);
  return answer.text();
}

function age(seconds) {
  if (seconds === null) return "no records";
  const units = [[86400, "d"], [3600, "h"], [60, "min"]];
  const [size, unit] = units.find(([size]) => seconds >= size) || [1, "s"];
  return `${Math.round(seconds / size)} ${unit} ago`;
}

function choose(name, isChosen) {
  if (isChosen) chosen.add(name); else chosen.delete(name);
  history.replaceState(null, "", `?${new URLSearchParams([...chosen].map((each) => ["run", each]))}`);
  refresh();
}

function showList(runs) {
  if (!chosen.size && runs.length) chosen.add(runs[0].name);
  list.replaceChildren(...runs.map((run) => {
    const box = element("input", { type: "checkbox" });
    box.checked = chosen.has(run.name);
    box.addEventListener("change", () => choose(run.name, box.checked));
    return element("label", {}, box, run.name, element("span", { class: "dim" }, age(run.age)));
  }));
  if (!runs.length) list.append(element("p", { class: "dim" }, "There are no runs here yet."));
}

function say(text) {
  document.getElementById("subtitle").textContent = text;
}

async function refresh() {
  const runs = JSON.parse(await get("runs"));
  showList(runs);
  const names = runs.map((run) => run.name).filter((name) => chosen.has(name));
  if (!names.length) return say("Choose one run, or several to compare.");
  const text = await get(`data?${new URLSearchParams(names.map((name) => ["run", name]))}`);
  if (text === drawnText) return;
  drawnText = text;
  const report = JSON.parse(text);
  if (report.error) say(report.error); else await draw(report);
}

async function follow() {
  await begun;
  for (;;) {
    const started = performance.now();
    try {
      await refresh();
    } catch (error) {
      say(`The dashboard can't be reached: ${error.message}`);
    }
    const took = performance.now() - started;
    await new Promise((resolve) => setTimeout(resolve, Math.max(LEAST_WAIT, 5 * took)));
  }
}

follow();
