"use strict";
(() => {
  const { key } = document.body.dataset;
  const at = (id) => document.getElementById(id);
  const put = (id, text) => { at(id).textContent = text; };
  const KEPT = "welltuned-start"; // what was typed outlives a reload
  let sets = {}; // choices that the user changed
  const act = async (what, body) => {
    try {
      const answer = await fetch(`/api/${what}`, { method: "POST", headers: { "content-type": "application/json", "x-welltuned-key": key }, body: JSON.stringify(body) });
      return await answer.json();
    } catch {
      return { error: "the server does not answer" };
    }
  };
  const asked = () => ({ ...Object.fromEntries(new FormData(at("form"))), sets });
  const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(1)} GB` : `${(bytes / 1e6).toFixed(0)} MB`);
  const say = (text, bad = false) => { put("state", text); at("state").className = text ? `notice${bad ? " bad" : ""}` : ""; };
  const items = (texts, kind) => texts.map((text) => { const item = document.createElement(kind); item.textContent = text; return item; });

  const row = (choice) => {
    const made = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    const code = document.createElement("code");
    code.textContent = choice.name;
    name.append(code);
    if (choice.by_user) {
      const by = document.createElement("span");
      by.className = "by";
      by.textContent = " yours";
      name.append(by);
    }
    const value = document.createElement("td");
    const input = document.createElement("input");
    input.value = choice.value;
    input.id = `choice-${choice.name}`;
    input.setAttribute("aria-label", choice.name);
    input.className = choice.by_user ? "mine" : "";
    input.addEventListener("change", () => {
      if (input.value.trim() === "" || input.value.trim() === "auto") delete sets[choice.name];
      else sets[choice.name] = input.value.trim();
      plan();
    });
    value.append(input);
    const [span, why] = [choice.span, choice.reason.slice(0, 1).toUpperCase() + choice.reason.slice(1)].map((text) => { const cell = document.createElement("td"); cell.textContent = text; return cell; });
    span.className = "span";
    made.append(name, value, span, why);
    return made;
  };

  // Parts of the forecast end to end, against what the machine has.
  const memory = ({ total, limit, fits, parts }) => {
    const whole = Math.max(total, limit ?? 0);
    at("memory").replaceChildren(...parts.map((part) => {
      const made = document.createElement("i");
      made.style.width = `${(100 * part.bytes) / whole}%`;
      made.title = `${part.name} ${size(part.bytes)}`;
      return made;
    }));
    const said = `${size(total)}${limit ? ` of the ${size(limit)} that can be used` : ""}${fits === false ? ": too much" : ""}`;
    at("memory").setAttribute("aria-label", `Memory: ${said}`);
    at("memory").className = fits === false ? "stack bad" : "stack";
    put("bytes", `${said}. ${parts.map((part) => `${part.name} ${size(part.bytes)}`).join(" · ")}`);
  };

  let latest = 0;
  const plan = async () => {
    const mine = ++latest;
    try { sessionStorage.setItem(KEPT, JSON.stringify(asked())); } catch { /* it is not kept then */ }
    say("Measuring the data and choosing …");
    const found = await act("plan", asked());
    if (mine !== latest) return; // a later edit was faster
    say(found.error ?? "", true);
    at("plan").classList.toggle("old", Boolean(found.error));
    if (found.error) return;
    const focused = document.activeElement?.id;
    at("plan").hidden = false;
    at("facts").replaceChildren(...found.facts.flatMap(([name, text]) => [...items([name], "dt"), ...items([text], "dd")]));
    memory(found.memory);
    at("warnings").hidden = !found.warnings.length;
    at("warnings").replaceChildren(...items(found.warnings, "li"));
    at("choices").replaceChildren(...found.choices.map(row));
    if (focused?.startsWith("choice-")) at(focused)?.focus(); // the row was made anew under the keyboard
  };
  at("form").addEventListener("submit", (event) => { event.preventDefault(); plan(); });

  at("go").addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = event.target.querySelector("button");
    button.disabled = true;
    const found = await act("start", { ...asked(), name: new FormData(event.target).get("name") });
    say(found.error ?? "It starts …", Boolean(found.error));
    if (found.error) { button.disabled = false; return; }
    const look = async () => {
      const job = await act("job", found);
      at("said").hidden = false;
      put("said", job.said ?? job.error);
      if (job.planned) location.href = `/run/${encodeURIComponent(found.name)}`;
      else if (job.code !== null && job.code !== undefined) { say(`It ended with exit code ${job.code}; what it said is below.`, true); button.disabled = false; }
      else setTimeout(look, 700);
    };
    look();
  });

  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
    if (kept) {
      sets = kept.sets ?? {};
      for (const field of at("form").elements) if (field.name && kept[field.name] !== undefined) field.value = kept[field.name];
      if (at("form").checkValidity()) plan();
    }
  } catch { /* nothing is kept */ }
})();
