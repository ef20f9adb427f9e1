using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using Microsoft.ML.OnnxRuntime;
using Microsoft.ML.OnnxRuntime.Tensors;

/// <summary>A bundle's graph in ONNX Runtime, its adapters and its cache.</summary>
sealed class Model : IDisposable
{
    static readonly string[] Known = { "input_ids", "attention_mask", "position_ids", "num_logits_to_keep" };

    readonly string folder;
    readonly InferenceSession session;
    readonly List<string> inputs, outputs;
    // A run does not keep its adapter alive.
    readonly List<OrtLoraAdapter> loaded = new List<OrtLoraAdapter>();
    readonly Dictionary<string, RunOptions> options = new Dictionary<string, RunOptions>();

    /// <summary>Opens the bundle in a folder.</summary>
    /// <exception cref="InvalidDataException">It is not the one that Facts tells of.</exception>
    public Model(string folder)
    {
        this.folder = folder;
        CheckManifest();
        OrtEnv.Instance().DisableTelemetryEvents();
        session = new InferenceSession(Path.Combine(folder, Facts.Graph));
        inputs = session.InputMetadata.Keys
            .Where(name => !name.StartsWith("lora.") && !name.StartsWith("past_key_values.")).ToList();
        var odd = inputs.Find(name => !Known.Contains(name));
        if (odd != null)
        {
            throw new InvalidDataException($"the graph has the input {odd}, which is not fed here");
        }
        outputs = CacheNames("present").Prepend(Facts.Output).ToList();
    }

    /// <summary>
    /// The likeliest tokens behind a prompt: <paramref name="most"/> at most, without the one that ends
    /// the text. Adapters are switched from call to call.
    /// </summary>
    public List<long> Generate(long[] prompt, string adapter, int most)
    {
        if (prompt.Length == 0)
        {
            throw new ArgumentException("the prompt is empty");
        }
        foreach (var wrong in prompt.Where(id => id < 0 || id >= Facts.Vocabulary))
        {
            throw new ArgumentException($"token {wrong} is not below {Facts.Vocabulary}");
        }
        if (Facts.Longest > 0)
        {
            if (prompt.Length > Facts.Longest)
            {
                throw new ArgumentException(
                    $"the prompt has {prompt.Length} tokens, and the model reads {Facts.Longest}");
            }
            most = Math.Min(most, Facts.Longest - prompt.Length + 1);
        }
        var chosen = Find(adapter);
        var start = StartOf(chosen.Invocation, prompt);
        // Before its invocation, such an adapter changes nothing.
        var then = start < prompt.Length ? adapter : Facts.Default;
        var found = new List<long>();
        using (var text = new Sequence())
        {
            long token = 0;
            if (start > 0)
            {
                token = Extend(text, prompt.Take(start).ToArray(), Facts.Default);
            }
            if (start < prompt.Length)
            {
                token = Extend(text, prompt.Skip(start).ToArray(), then);
            }
            while (found.Count < most && !chosen.Ends.Contains(token))
            {
                found.Add(token);
                if (found.Count < most)
                {
                    token = Extend(text, new[] { token }, then);
                }
            }
        }
        return found;
    }

    public void Dispose()
    {
        foreach (var each in options.Values)
        {
            each.Dispose();
        }
        foreach (var each in loaded)
        {
            each.Dispose();
        }
        session.Dispose();
    }

    /// <summary>Keys and values of the tokens so far, behind the logits of the last run.</summary>
    sealed class Sequence : IDisposable
    {
        public int Length;
        public IReadOnlyList<OrtValue> Cache;
        IDisposable owner;

        public Sequence()
        {
            var shape = new[] { 1, Facts.Heads, 0, Facts.HeadSize };
            var type = Facts.Half ? TensorElementType.Float16 : TensorElementType.Float;
            Cache = Enumerable.Range(0, 1 + 2 * Facts.Layers)
                .Select(_ => OrtValue.CreateAllocatedTensorValue(OrtAllocator.DefaultInstance, type, shape))
                .ToList();
        }

        public void Replace(IDisposableReadOnlyCollection<OrtValue> found)
        {
            Dispose();
            owner = found;
            Cache = found.ToList();
        }

        public void Dispose()
        {
            if (owner != null)
            {
                owner.Dispose();
                return;
            }
            foreach (var each in Cache)
            {
                each.Dispose();
            }
        }
    }

    /// <summary>Appends tokens to a text; the likeliest token behind them.</summary>
    long Extend(Sequence text, long[] ids, string adapter)
    {
        var total = text.Length + ids.Length;
        var fed = new Dictionary<string, OrtValue>();
        foreach (var name in inputs)
        {
            fed[name] = Tensor(name, ids, text.Length);
        }
        var own = fed.Values.ToList();
        var next = 1;
        foreach (var name in CacheNames("past_key_values"))
        {
            fed[name] = text.Cache[next++];
        }
        IDisposableReadOnlyCollection<OrtValue> found;
        try
        {
            found = session.Run(Active(adapter), fed, outputs);
        }
        finally
        {
            own.ForEach(each => each.Dispose());
        }
        text.Replace(found);
        text.Length = total;
        var vocabulary = (int)text.Cache[0].GetTensorTypeAndShape().Shape.Last();
        var logits = text.Cache[0].GetTensorDataAsSpan<float>();
        logits = logits.Slice(logits.Length - vocabulary);
        var best = 0;
        for (var index = 1; index < logits.Length; index++)
        {
            best = logits[index] > logits[best] ? index : best;
        }
        return best;
    }

    static OrtValue Tensor(string name, long[] ids, int length)
    {
        var total = length + ids.Length;
        switch (name)
        {
            case "input_ids":
                return OrtValue.CreateTensorValueFromMemory(ids, new long[] { 1, ids.Length });
            case "attention_mask":
                var mask = Enumerable.Repeat(1L, total).ToArray();
                return OrtValue.CreateTensorValueFromMemory(mask, new long[] { 1, total });
            case "position_ids":
                var places = Enumerable.Range(length, ids.Length).Select(place => (long)place).ToArray();
                return OrtValue.CreateTensorValueFromMemory(places, new long[] { 1, ids.Length });
            default:  // the logits of one token are computed
                return OrtValue.CreateTensorValueFromMemory(new[] { 1L }, new long[0]);
        }
    }

    /// <summary>What a run is given so that an adapter is active: ONNX Runtime feeds its file.</summary>
    RunOptions Active(string adapter)
    {
        if (!options.ContainsKey(adapter))
        {
            var file = Find(adapter).File;
            var made = new RunOptions();
            if (file != "")
            {
                loaded.Add(OrtLoraAdapter.Create(Path.Combine(folder, file), null));
                made.AddActiveLoraAdapter(loaded.Last());
            }
            options[adapter] = made;
        }
        return options[adapter];
    }

    static IEnumerable<string> CacheNames(string what)
    {
        return Enumerable.Range(0, Facts.Layers)
            .SelectMany(layer => new[] { $"{what}.{layer}.key", $"{what}.{layer}.value" });
    }

    static Facts.Adapter Find(string name)
    {
        var found = Array.Find(Facts.Adapters, adapter => adapter.Name == name);
        if (found == null)
        {
            var known = string.Join(", ", Facts.Adapters.Select(adapter => adapter.Name));
            throw new ArgumentException($"there is no adapter {name}; there are: {known}");
        }
        return found;
    }

    /// <summary>The place from which an adapter is active; the prompt's length: nowhere.</summary>
    static int StartOf(long[] invocation, long[] prompt)
    {
        if (invocation.Length == 0)
        {
            return 0;
        }
        for (var start = prompt.Length - invocation.Length; start >= 0; start--)
        {
            if (prompt.Skip(start).Take(invocation.Length).SequenceEqual(invocation))
            {
                return start;
            }
        }
        return prompt.Length;
    }

    /// <summary>FNV-1a, 64 bits.</summary>
    void CheckManifest()
    {
        var file = Path.Combine(folder, "lora_edge.json");
        if (!File.Exists(file))
        {
            throw new InvalidDataException($"{folder} has no lora_edge.json: it is no bundle");
        }
        var hash = 14695981039346656037;
        foreach (var each in File.ReadAllBytes(file))
        {
            hash = unchecked((hash ^ each) * 1099511628211);
        }
        if (hash != Facts.Manifest)
        {
            throw new InvalidDataException(
                $"{folder} is not the bundle that this program was written for; write the project again: "
                + "lora-edge kit BUNDLE csharp -o FOLDER --force");
        }
    }
}
