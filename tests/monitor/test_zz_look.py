import json
def test_look(watched, noise_file, capsys):
    import os
    opts = json.loads(os.environ["OPTS"])
    for name, o in opts.items():
        if o.get("data") == "noise": o["data"] = noise_file
        w = watched(**o)
        with capsys.disabled():
            ups, evs = w.updates, w.evaluations
            print("\n==", name, w.error, "updates", len(ups), "evals", len(evs), "change", ups[-1].weight_change)
            print("  train", [round(u.loss,3) for u in ups[::max(1,len(ups)//12)]], round(ups[-1].loss,3))
            print("  held", [(e.step, round(e.eval_loss,3), round(e.eval_loss_se,3)) for e in evs])
            print("  sec/update", sum(u.tokens/u.tokens_per_second for u in ups)/len(ups))
            for f in w.findings.values(): print("   >>", f.severity, f.id, f.sentence, dict(f.changes))
