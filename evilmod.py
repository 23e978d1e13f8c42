open('/tmp/h/MARK','w')
x=1
