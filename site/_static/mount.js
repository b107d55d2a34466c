// Puts a lab in every place that waits for one. A place holds a picture and its numbers; where this script runs, the lab
// takes its place, without a kernel: its data was made when the notebook ran. What is set on it is in the page's
// address, so that it can be sent, and the browser's back and forward lead through it.
const LABS = new URL("labs/", import.meta.url), FABLE = new URL("fable/", import.meta.url);

// ?dial.strength=0.5&dial.prompt=… -> { strength: 0.5, prompt: "…" }; what the lab does not have, or has in another
// type, is passed over.
function inAddress(name, state) {
  const found = {};
  for (const [address, text] of new URLSearchParams(location.search)) {
    const key = address.startsWith(`${name}.`) ? address.slice(name.length + 1) : null;
    if (key === null || !(key in state)) continue;
    let value = text.trim();
    if (typeof state[key] !== "string") try { value = JSON.parse(text); } catch { continue; }
    const alike = state[key] === null ? typeof value === "object" : value !== null && typeof value === typeof state[key];
    if (alike && value !== "") found[key] = value;
  }
  return found;
}

function modelOf(name, { data, state }) {
  const listeners = {}, traits = { data };
  const read = () => { const asked = inAddress(name, state); traits.state = { ...state, ...asked }; traits.asked = Object.keys(asked); };
  let timer = null, last = { key: "", at: 0 };
  read();
  const keep = () => {
    const address = new URL(location);
    for (const key of Object.keys(state)) {
      const value = traits.state[key], plain = typeof value === "string" ? value : JSON.stringify(value);
      if (JSON.stringify(value) === JSON.stringify(state[key]) || plain.length > 200) address.searchParams.delete(`${name}.${key}`);
      else address.searchParams.set(`${name}.${key}`, plain);
    }
    if (address.href === location.href) return;
    const key = Object.keys(state).filter((each) => address.searchParams.get(`${name}.${each}`)
      !== new URL(location).searchParams.get(`${name}.${each}`)).join();
    const goesOn = key === last.key && Date.now() - last.at < 3000;            // one control on its way is one step back
    history[goesOn ? "replaceState" : "pushState"](null, "", address);
    last = { key, at: Date.now() };
  };
  window.addEventListener("popstate", () => {
    last = { key: "", at: 0 };
    read();
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
  for (const asks of ["writes", "trains"]) if (lab.data[asks]) lab.data[asks] = false;        // a kernel, and here is none
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
const asked = places.find(([, name]) => [...new URLSearchParams(location.search).keys()].some((key) => key.startsWith(`${name}.`)));
if (asked && !location.hash) asked[0].scrollIntoView();
