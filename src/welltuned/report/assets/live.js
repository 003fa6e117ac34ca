"use strict";
// A page that is served hears of what is new. Everything is text: nothing that a run says becomes an element.
(() => {
  const { events, key, name } = document.body.dataset;
  const at = (id) => document.getElementById(id);
  const put = (id, text) => { at(id).textContent = text; };
  const act = async (what, body) => {
    try {
      const answer = await fetch(`/api/${what}`, { method: "POST", headers: { "content-type": "application/json", "x-welltuned-key": key }, body: JSON.stringify({ name, ...body }) });
      return await answer.json();
    } catch {
      return { error: "the server does not answer" };
    }
  };

  if (key) {
    for (const [what, done] of [["stop", "it finishes this update, saves, and ends"], ["resume", "it goes on"]]) {
      at(what).addEventListener("click", async () => {
        at(what).disabled = true;
        put("answer", "…");
        const found = await act(what, {});
        put("answer", found.error ?? done);
        at(what).disabled = false;
      });
    }
    at("ask")?.addEventListener("submit", async (event) => {
      event.preventDefault();
      const said = new FormData(event.target);
      const button = event.target.querySelector("button");
      button.disabled = true;
      put("base", "thinking …"); put("tuned", "thinking …");
      const found = await act("chat", { prompt: said.get("prompt"), system: said.get("system") });
      put("base", found.error ?? (found.base || "(nothing)")); put("tuned", found.error ?? (found.reply || "(nothing)"));
      button.disabled = false;
    });
  }

  let running = false;
  const source = new EventSource(events);
  source.onmessage = (message) => {
    const now = JSON.parse(message.data);
    if (now.finished && running) { location.reload(); return; }
    running = !now.finished;
    run.update(now.curves);
    put("sentence", now.sentence);
    put("health", now.health[1]);
    at("health").className = `health ${now.health[0]}`;
    at("progress").value = now.done;
    at("progress").hidden = now.finished;
    put("state", now.state);
    at("tiles").replaceChildren(...now.tiles.map((texts) => {
      const tile = document.createElement("div");
      tile.append(...texts.map((text, index) => { const part = document.createElement(index ? "dd" : "dt"); part.textContent = text; if (index === 2) part.className = "sub"; return part; }));
      return tile;
    }));
    if (key) {
      at("stop").hidden = !now.running;
      at("resume").hidden = now.running || now.finished;
      if (now.finished) put("answer", "");
    }
    at("log").replaceChildren(...now.log.map((text) => { const item = document.createElement("li"); item.textContent = text; return item; }));
    if (now.finished) source.close();
  };
  source.onerror = () => put("state", "not connected: trying again");
})();
