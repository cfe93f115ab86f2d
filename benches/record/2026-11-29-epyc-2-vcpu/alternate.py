# Runs allreduce-bench commands in turn and prints the median of their medians, the least median and the least time of each.
#   python3 alternate.py TURNS "common flags" name="command" name="command" …
import json
import statistics as st
import subprocess
import sys
import tempfile

turns, common = int(sys.argv[1]), sys.argv[2].split()
ways = [way.split('=', 1) for way in sys.argv[3:]]
out = tempfile.mktemp('.json')
res = {}
for t in range(turns):
    for name,cmd in (ways if t%2==0 else ways[::-1]):
        subprocess.run(cmd.split()+common+['-c','0','--json',out],stdout=subprocess.DEVNULL,stderr=subprocess.DEVNULL,check=True)
        for row in json.load(open(out)):
            k=(row['bytes'],row['dtype'],row['algorithm'],row['ranks'])
            res.setdefault(k,{}).setdefault(name,[]).append((row['time_us'],row['min_us']))
for k,v in sorted(res.items(),key=str):
    for name,rows in v.items():
        print(k,'%-8s'%name,'median of medians %9.1f  least of medians %9.1f  least %9.1f us'%(st.median(r[0] for r in rows),min(r[0] for r in rows),min(r[1] for r in rows)), [round(r[0]) for r in rows])
