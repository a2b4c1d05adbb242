import sys
def test_mem():
    for m in ("0","1"):
        sys.argv=["x",m,"hook","225"]
        exec(open('/tmp/fake/mem.py').read(), {})
