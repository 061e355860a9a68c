{{/* The run's configuration as the services read it: the user's `config:` with what only the chart
     knows (addresses, ports, paths) put over it, and a cluster's patience under it. */}}

{{- define "lagwise.runName" -}}
{{- ((.Values.config | default dict).run | default dict).name | default "run" -}}
{{- end -}}

{{- define "lagwise.modelSource" -}}
{{- ((.Values.config | default dict).model | default dict).source | default "examples/frozen_lake/base" -}}
{{- end -}}

{{/* Where the model lies inside the pods. */}}
{{- define "lagwise.modelPath" -}}
{{- $source := include "lagwise.modelSource" . -}}
{{- if hasPrefix "hf://" $source -}}
{{- printf "/models/%s" (trimPrefix "hf://" $source | replace "@" "/") -}}
{{- else if hasPrefix "pvc://" $source -}}
{{- $parts := splitn "/" 2 (trimPrefix "pvc://" $source) -}}
{{- printf "/models/%s" ($parts._1 | default "") | trimSuffix "/" -}}
{{- else -}}
{{- $source -}}
{{- end -}}
{{- end -}}

{{- define "lagwise.drainSeconds" -}}
{{- ((.Values.config | default dict).telemetry | default dict).drain_s | default 15 | ceil | int -}}
{{- end -}}

{{- define "lagwise.archive" -}}
{{- $run := (.Values.config | default dict).run | default dict -}}
{{- if not (hasKey $run "archive") -}}true{{- else if $run.archive -}}true{{- end -}}
{{- end -}}

{{- define "lagwise.tls" -}}
{{- .Values.nats.tls.secretName -}}
{{- end -}}

{{- define "lagwise.natsUrl" -}}
{{- if .Values.nats.enabled -}}
{{- printf "%s://%s:4222" (ternary "tls" "nats" (ne (include "lagwise.tls" .) "")) (include "lagwise.objectName" (dict "root" . "role" "nats")) -}}
{{- else -}}
{{- .Values.nats.external.url -}}
{{- end -}}
{{- end -}}

{{/* How many processes a learner or an oracle is: as said, otherwise one for each of its GPUs.
     scope: root, role. */}}
{{- define "lagwise.ranks" -}}
{{- $values := index .root.Values .role -}}
{{- $nodes := int ($values.nodes | default 1) -}}
{{- $gpus := mul $nodes (int $values.gpu.count) -}}
{{- $said := (index (.root.Values.config | default dict) .role | default dict).ranks -}}
{{- $ranks := int ($said | default (max $nodes $gpus)) -}}
{{- if mod $ranks $nodes -}}
{{- fail (printf "config.%s.ranks %d: no multiple of %s.nodes %d" .role $ranks .role $nodes) -}}
{{- end -}}
{{- if and (gt $gpus 0) (ne (int $ranks) (int $gpus)) -}}
{{- fail (printf "config.%s.ranks %d: %s.nodes %d x %s.gpu.count %d are %d GPUs, one for each rank" .role $ranks .role $nodes .role (int $values.gpu.count) (int $gpus)) -}}
{{- end -}}
{{- $ranks -}}
{{- end -}}

{{- define "lagwise.resolvedConfig" -}}
{{- $bus := dict "url" (include "lagwise.natsUrl" .) -}}
{{- if include "lagwise.tls" . -}}
{{- $_ := set $bus "tls_ca_file" "/etc/lagwise-tls/ca.crt" -}}
{{- end -}}
{{- $ours := dict
      "bus" $bus
      "model" (dict "source" (include "lagwise.modelPath" .))
      "run" (dict "dir" "/run-data")
      "telemetry" (dict "port" 9090) -}}
{{- $patience := dict
      "bus" (dict "connect_timeout_s" 120)
      "telemetry" (dict "host" "0.0.0.0")
      "learner" (dict "at_end" "wait" "ranks" (include "lagwise.ranks" (dict "root" . "role" "learner") | int))
      "rollout" (dict "streams_timeout_s" 3600)
      "env_agents" (dict "streams_timeout_s" 3600)
      "logit_oracle" (dict "streams_timeout_s" 3600 "ranks" (include "lagwise.ranks" (dict "root" . "role" "logit_oracle") | int)) -}}
{{- $config := mergeOverwrite $patience (deepCopy (.Values.config | default dict)) $ours -}}
{{- dict "config" $config | toPrettyJson -}}
{{- end -}}
