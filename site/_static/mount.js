// Puts a lab in every place that waits for one. A place holds a picture and its numbers; where this script runs, the lab
// takes its place, without a kernel: its data was made when the notebook ran. What is set on it is in the page's
// address, so that it can be sent, and the browser's back and forward lead through it.
const LABS = new URL("labs/", import.meta.url), FABLE = new URL("fable/", import.meta.url);

// ?dial.strength=0.5&dial.prompt=… -> { strength: 0.5, prompt: "…" }
function inAddress(name) {
  const found = {};
  for (const [key, value] of new URLSearchParams(location.search)) {
    if (!key.startsWith(`${name}.`)) continue;
    try { found[key.slice(name.length + 1)] = JSON.parse(value); } catch { found[key.slice(name.length + 1)] = value; }
  }
  return found;
}

function modelOf(name, { data, state }) {
  const listeners = {}, known = (settings) => Object.fromEntries(Object.entries(settings).filter(([key]) => key in state));
  const traits = { data, state: { ...state, ...known(inAddress(name)) } };
  let timer = null;
  const keep = () => {
    const address = new URL(location);
    for (const key of Object.keys(state)) {
      const value = traits.state[key], plain = typeof value === "string" ? value : JSON.stringify(value);
      if (JSON.stringify(value) === JSON.stringify(state[key]) || plain.length > 200) address.searchParams.delete(`${name}.${key}`);
      else address.searchParams.set(`${name}.${key}`, plain);
    }
    if (address.href !== location.href) history.pushState(null, "", address);
  };
  window.addEventListener("popstate", () => {
    traits.state = { ...state, ...known(inAddress(name)) };
    for (const listener of listeners["change:state"] ?? []) listener();
  });
  return {
    get: (trait) => traits[trait], set: (trait, value) => { traits[trait] = value; },
    save_changes: () => { clearTimeout(timer); timer = setTimeout(keep, 400); },
    send: () => {}, on: (event, listener) => (listeners[event] ??= []).push(listener),
    off: (event, listener) => { listeners[event] = (listeners[event] ?? []).filter((each) => each !== listener); },
  };
}

// fable's own files lie beside this script.
function located(data) {
  const at = (path) => (typeof path === "string" && path.startsWith("fable/") ? new URL(path.slice(6), FABLE).href : path);
  if (data.weights) data.weights = at(data.weights);
  for (const adapter of data.adapters ?? []) adapter.tensors = at(adapter.tensors);
  return data;
}

async function mount(place, name) {
  const answer = await fetch(new URL(`${place.dataset.lab}.json`, LABS));
  if (!answer.ok) throw new Error(`${answer.url}: ${answer.status}`);
  const lab = await answer.json(), { default: module } = await import(new URL(`${lab.module}.mjs`, LABS));
  const el = document.createElement("div");
  if (lab.data.writes) lab.data.writes = false;        // asks a kernel, and here is none
  place.append(el);
  place.classList.add("alive");
  module.render({ model: modelOf(name, { ...lab, data: located(lab.data) }), el });
  place.dataset.alive = "true";
}

const counts = {}, places = [...document.querySelectorAll(".lora-place[data-lab]")].map((place) => {
  const kind = place.dataset.module, count = (counts[kind] = (counts[kind] ?? 0) + 1);
  return [place, count === 1 ? kind : `${kind}-${count}`];
});
const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (!entry.isIntersecting) return;
  seen.unobserve(entry.target);
  const [place, name] = places.find(([each]) => each === entry.target);
  mount(place, name).catch((error) => { place.classList.remove("alive"); console.error(error); });
}), { rootMargin: "600px" });
for (const [place] of places) seen.observe(place);
const asked = places.find(([, name]) => Object.keys(inAddress(name)).length);
if (asked && !location.hash) asked[0].scrollIntoView();
