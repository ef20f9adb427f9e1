# ONNX Runtime's C# as Mono's compiler reads it (C# 7): the same, said in older words.
s/\busing var /var /
s/^( *)static ([A-Za-z<>\[\], ]+ [A-Za-z]+\([^)]*\) =>)/\1\2/
s/^( {12,})static (\w.*\)\s*)$/\1\2/
s/\bstatic (\w+ =>)/\1/
s/ is null\b/ == null/g
s/ is not null\b/ != null/g
s/\((\S+) is not (\w+)\)/(!(\1 is \2))/
s/([A-Z]\w*<\w+>) (\w+) = new\(/\1 \2 = new \1(/
s/: unmanaged/: struct/g
s/(\w+)\.Span\[(\w+)\] = (.*);/{ var span = \1.Span; span[\2] = \3; }/
s/^( *)(\w+\[\w+\]) = (\w+\[\w+\]) = (\w+);/\1\2 = \4; \3 = \4;/
