"use strict";
(() => {
  const { key } = document.body.dataset;
  const at = (id) => document.getElementById(id);
  const put = (id, text) => { at(id).textContent = text; };
  const sets = {}; // choices that the user changed
  const act = async (what, body) => {
    const answer = await fetch(`/api/${what}`, { method: "POST", headers: { "content-type": "application/json", "x-welltuned-key": key }, body: JSON.stringify(body) });
    return answer.json();
  };
  const asked = () => ({ ...Object.fromEntries(new FormData(at("form"))), sets });
  const size = (bytes) => `${(bytes / 1e9).toFixed(1)} GB`;

  const row = (choice) => {
    const made = document.createElement("tr");
    const name = document.createElement("th");
    name.scope = "row";
    name.textContent = choice.name;
    const value = document.createElement("td");
    const input = document.createElement("input");
    input.value = choice.value;
    input.setAttribute("aria-label", choice.name);
    input.className = choice.by_user ? "mine" : "";
    input.addEventListener("change", () => {
      if (input.value.trim() === "" || input.value.trim() === "auto") delete sets[choice.name];
      else sets[choice.name] = input.value.trim();
      plan();
    });
    value.append(input);
    const [span, why] = [choice.span, choice.reason].map((text) => { const cell = document.createElement("td"); cell.textContent = text; return cell; });
    made.append(name, value, span, why);
    return made;
  };

  let latest = 0;
  const plan = async () => {
    const mine = ++latest;
    put("state", "Measuring the data and choosing …");
    const found = await act("plan", asked());
    if (mine !== latest) return; // a later edit was faster
    put("state", found.error ?? "");
    if (found.error) return;
    at("plan").hidden = false;
    put("time", found.time);
    const { total, limit, fits } = found.memory;
    at("memory").value = limit ? Math.min(total / limit, 1) : 0;
    put("bytes", limit ? `${size(total)} of ${size(limit)}${fits === false ? ": too much" : ""}` : size(total));
    at("warnings").replaceChildren(...found.warnings.map((text) => { const item = document.createElement("li"); item.textContent = text; return item; }));
    at("choices").replaceChildren(...found.choices.map(row));
  };
  at("form").addEventListener("submit", (event) => { event.preventDefault(); plan(); });

  at("go").addEventListener("submit", async (event) => {
    event.preventDefault();
    const found = await act("start", { ...asked(), name: new FormData(event.target).get("name") });
    put("state", found.error ?? "It starts …");
    if (found.error) return;
    const look = async () => {
      const job = await act("job", found);
      put("said", job.said ?? job.error);
      if (job.planned) location.href = `/run/${encodeURIComponent(found.name)}`;
      else if (job.code !== null) put("state", `It ended with exit code ${job.code}.`);
      else setTimeout(look, 700);
    };
    look();
  });
})();
