import sys, tempfile, time
from pathlib import Path
import aims, trial
from workshop import Workshop
only = sys.argv[2:]
n = int(sys.argv[1])
with tempfile.TemporaryDirectory() as d:
    shop = Workshop(Path(d))
    for name, make in aims.targets(shop).items():
        if only and not any(o in name for o in only): continue
        t=time.time(); target = make(); built=time.time()-t
        a,e = trial.judged(target.starts[0].run, target.starts[0].data)
        if e or not a: print('!! whole input not accepted:', name, repr(e))
        t=time.time(); c = trial.attack(target, range(n or target.cases), 15)
        took=time.time()-t
        print(f"{name:50s} build {built:5.2f} cases {c.cases} ok {c.accepted} ref {c.refused} crash {len(c.crashes)} {1000*took/c.cases:.1f} ms", flush=True)
        for x in c.crashes:
            if x.said: print('   ', x, flush=True)
