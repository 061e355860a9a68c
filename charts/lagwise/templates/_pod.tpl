{{/* The pod of a service. scope: root, role. One container named as the role; the learner has a
     recorder beside it. With `worker` true, a further node of a learner: its ranks follow those of
     the first, have no bus and answer nobody. `podSpecExtra` is merged over the whole. */}}

{{- define "lagwise.podTemplate" -}}
{{- $values := index .root.Values .role -}}
metadata:
  labels:
    {{- include "lagwise.labels" . | nindent 4 }}
    {{- with $values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "lagwise.resolvedConfig" .root | sha256sum }}
    kubectl.kubernetes.io/default-container: {{ include "lagwise.component" . }}
    {{- with $values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  {{- $spec := include "lagwise.podSpec" . | fromYaml -}}
  {{- if $spec.Error }}{{ fail (printf "pod spec of %s: %s" .role $spec.Error) }}{{ end -}}
  {{- mergeOverwrite $spec (deepCopy ($values.podSpecExtra | default dict)) | toYaml | nindent 2 }}
{{- end -}}

{{- define "lagwise.podSpec" -}}
{{- $values := index .root.Values .role -}}
{{- $fetch := hasPrefix "hf://" (include "lagwise.modelSource" .root) -}}
serviceAccountName: {{ include "lagwise.objectName" . }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ include "lagwise.graceSeconds" . }}
securityContext:
  {{- include "lagwise.podSecurity" .root | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- include "lagwise.placement" $values }}
{{- with $values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- $records := and (eq .role "learner") (not .worker) (include "lagwise.archive" .root) }}
{{- if or $fetch $records }}
initContainers:
  {{- if $fetch }}
  - name: fetch-model
    {{- include "lagwise.containerBasics" . | nindent 4 }}
    command: [python, -m, shared.runtime.model_source]
    args:
      - {{ include "lagwise.modelSource" .root }}
      - {{ include "lagwise.modelPath" .root }}
      - --files
      - {{ $values.modelFiles | default "all" }}
    env:
      {{- include "lagwise.cacheEnv" . | nindent 6 }}
      {{- with .root.Values.huggingface }}
      {{- if .offline }}
      - name: HF_HUB_OFFLINE
        value: "1"
      {{- end }}
      {{- with .endpoint }}
      - name: HF_ENDPOINT
        value: {{ . | quote }}
      {{- end }}
      {{- with .tokenSecret }}
      {{- if .name }}
      - name: HF_TOKEN
        valueFrom:
          secretKeyRef:
            name: {{ .name }}
            key: {{ .key }}
      {{- end }}
      {{- end }}
      {{- end }}
    resources:
      {{- $values.resources | default dict | toYaml | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      - name: models
        mountPath: /models
  {{- end }}
  {{- if $records }}
  # A native sidecar: it ends after the learner and so archives its last words.
  - name: recorder
    restartPolicy: Always
    {{- include "lagwise.containerBasics" . | nindent 4 }}
    command: [python, -m, shared.cli.recorder]
    args: [--config, /etc/lagwise/values.yaml]
    env:
      {{- include "lagwise.cacheEnv" . | nindent 6 }}
      {{- include "lagwise.busEnv" (dict "root" .root "account" "recorder") | nindent 6 }}
      {{- with $values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    resources:
      requests:
        cpu: 100m
        memory: 512Mi
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      - name: config
        mountPath: /etc/lagwise
        readOnly: true
      - name: run-data
        mountPath: /run-data
      {{- include "lagwise.busMounts" (dict "root" .root "account" "recorder") | nindent 6 }}
  {{- end }}
{{- end }}
containers:
  - name: {{ include "lagwise.component" . }}
    {{- include "lagwise.containerBasics" . | nindent 4 }}
    {{- include "lagwise.command" . | nindent 4 }}
    env:
      - name: POD_NAME
        valueFrom:
          fieldRef:
            apiVersion: v1
            fieldPath: metadata.name
      {{- include "lagwise.cacheEnv" . | nindent 6 }}
      - name: HF_HUB_OFFLINE
        value: "1"
      {{- if not .worker }}
      {{- include "lagwise.busEnv" (dict "root" .root "account" .role) | nindent 6 }}
      {{- end }}
      {{- if eq .role "learner" }}
      # Halves the CPU time of publishing weights: large buffers are kept instead of remapped.
      - name: MALLOC_MMAP_THRESHOLD_
        value: "1073741824"
      - name: MALLOC_TRIM_THRESHOLD_
        value: "4294967296"
      {{- end }}
      {{- with $values.extraEnv }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
    {{- if not .worker }}
    ports:
      - name: metrics
        containerPort: 9090
        protocol: TCP
    {{- include "lagwise.probes" . | nindent 4 }}
    {{- end }}
    resources:
      {{- include "lagwise.resources" . | nindent 6 }}
    volumeMounts:
      - name: tmp
        mountPath: /tmp
      - name: config
        mountPath: /etc/lagwise
        readOnly: true
      {{- if $values.shmSize }}
      - name: shm
        mountPath: /dev/shm
      {{- end }}
      {{- if eq .role "learner" }}
      - name: run-data
        mountPath: /run-data
      {{- end }}
      {{- if ne (include "lagwise.modelVolume" .) "" }}
      - name: models
        mountPath: /models
        readOnly: true
      {{- end }}
      {{- if not .worker }}
      {{- include "lagwise.busMounts" (dict "root" .root "account" .role) | nindent 6 }}
      {{- end }}
      {{- with $values.extraVolumeMounts }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
volumes:
  - name: tmp
    emptyDir: {}
  - name: config
    configMap:
      name: {{ include "lagwise.objectName" (dict "root" .root "role" "config") }}
  {{- with $values.shmSize }}
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ . }}
  {{- end }}
  {{- with include "lagwise.modelVolume" . }}
  - name: models
    {{- . | nindent 4 }}
  {{- end }}
  {{- if and (eq .role "learner") $values.storage.existingClaim }}
  - name: run-data
    persistentVolumeClaim:
      claimName: {{ $values.storage.existingClaim }}
  {{- end }}
  {{- if not .worker }}
  {{- include "lagwise.busVolumes" (dict "root" .root "accounts" (ternary (list "learner" "recorder") (list .role) (eq .role "learner"))) | nindent 2 }}
  {{- end }}
  {{- with $values.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* One process, or torchrun with those of this node. Its ranks end together and are started again
     together, by the kubelet: torchrun itself restarts nothing. A LeaderWorkerSet says in the
     environment which node of the group this is, and where the first one is. */}}
{{- define "lagwise.command" -}}
{{- $values := index .root.Values .role -}}
{{- $ranks := 1 -}}
{{- if has .role (list "learner" "logit_oracle") -}}
{{- $ranks = include "lagwise.ranks" . | int -}}
{{- end -}}
{{- if eq $ranks 1 -}}
command: [python, -m, services.{{ .role }}]
args: [--config, /etc/lagwise/values.yaml, --pod, $(POD_NAME)]
{{- else -}}
{{- $nodes := int ($values.nodes | default 1) -}}
command: [python, -m, shared.cli.torchrun]
args:
  {{- if eq $nodes 1 }}
  - --standalone
  {{- else }}
  - --nnodes={{ $nodes }}
  - --node-rank=$(LWS_WORKER_INDEX)
  - --master-addr=$(LWS_LEADER_ADDRESS)
  - --master-port=29500
  {{- end }}
  - --nproc-per-node={{ div $ranks $nodes }}
  - --max-restarts=0
  - --shutdown-timeout={{ add (int (include "lagwise.drainSeconds" .root)) 3 }}
  - -m
  - services.{{ .role }}
  - --config
  - /etc/lagwise/values.yaml
  - --pod
  - $(POD_NAME)
{{- end -}}
{{- end -}}

{{/* Image and hardening, the same for every container of ours. */}}
{{- define "lagwise.containerBasics" -}}
image: {{ include "lagwise.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- include "lagwise.containerSecurity" . | nindent 2 }}
{{- end -}}

{{- define "lagwise.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "lagwise.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.runAsUser }}
runAsUser: {{ int . }}
runAsGroup: {{ int . }}
fsGroup: {{ int . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* Where a pod may run; the argument is any values with PodValues' keys. */}}
{{- define "lagwise.placement" -}}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .topologySpreadConstraints }}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- end -}}

{{/* Requests and limits, GPUs added to both: Kubernetes does not overcommit them. */}}
{{- define "lagwise.resources" -}}
{{- $values := index .root.Values .role -}}
{{- $resources := deepCopy ($values.resources | default dict) -}}
{{- if eq .role "rollout" -}}
{{- $engine := ((.root.Values.config | default dict).rollout | default dict) -}}
{{- $ranks := int (($engine.vllm | default dict).tensor_parallel_size | default 1) -}}
{{- if and (eq ($engine.engine | default "torch") "vllm") (gt (int $values.gpu.count) 0) (ne $ranks (int $values.gpu.count)) -}}
{{- fail (printf "config.rollout.vllm.tensor_parallel_size %d: a rollout has rollout.gpu.count %d GPUs" $ranks (int $values.gpu.count)) -}}
{{- end -}}
{{- end -}}
{{- if gt (int $values.gpu.count) 0 -}}
{{- $gpu := dict $values.gpu.resource (int $values.gpu.count) -}}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpu "requests" (deepCopy $gpu)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Longer than the drain: the kubelet must not kill what is still handing work back. The recorder
     ends after the learner, within the same period: it reads to the streams' ends (15 s at most). */}}
{{- define "lagwise.graceSeconds" -}}
{{- $values := index .root.Values .role -}}
{{- $drain := int (include "lagwise.drainSeconds" .root) -}}
{{- $grace := int ($values.terminationGracePeriodSeconds | default (add $drain (ternary 45 15 (and (eq .role "learner") (ne (include "lagwise.archive" .root) ""))))) -}}
{{- if le $grace $drain -}}
{{- fail (printf "%s.terminationGracePeriodSeconds %d: must exceed config.telemetry.drain_s %d" .role $grace $drain) -}}
{{- end -}}
{{- $grace -}}
{{- end -}}

{{/* startup: ready for the first time (model loaded, weights held). readiness: can do its work now.
     liveness: the event loop runs; it never depends on anybody else. */}}
{{- define "lagwise.probes" -}}
{{- $values := index .root.Values .role -}}
startupProbe:
  httpGet:
    path: /startupz
    port: metrics
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: {{ divf $values.startupSeconds 5 | ceil | int }}
readinessProbe:
  httpGet:
    path: /readyz
    port: metrics
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet:
    path: /healthz
    port: metrics
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{/* A read-only root and no home: every cache goes below /tmp. */}}
{{- define "lagwise.cacheEnv" -}}
- name: HOME
  value: /tmp
- name: XDG_CACHE_HOME
  value: /tmp/cache
- name: HF_HOME
  value: /tmp/huggingface
- name: MPLCONFIGDIR
  value: /tmp/matplotlib
- name: NUMBA_CACHE_DIR
  value: /tmp/numba
- name: TRITON_CACHE_DIR
  value: /tmp/triton
- name: TORCHINDUCTOR_CACHE_DIR
  value: /tmp/inductor
- name: VLLM_CACHE_ROOT
  value: /tmp/vllm
- name: TOKENIZERS_PARALLELISM
  value: "false"
{{- end -}}

{{/* A source of a volume for /models; empty when the model needs none. */}}
{{- define "lagwise.modelVolume" -}}
{{- $source := include "lagwise.modelSource" .root -}}
{{- if hasPrefix "pvc://" $source -}}
persistentVolumeClaim:
  claimName: {{ (splitn "/" 2 (trimPrefix "pvc://" $source))._0 }}
  readOnly: true
{{- else if hasPrefix "hf://" $source -}}
{{- with .root.Values.modelCache.claim -}}
persistentVolumeClaim:
  claimName: {{ . }}
{{- else -}}
emptyDir:
  sizeLimit: {{ .root.Values.modelCache.sizeLimit }}
{{- end -}}
{{- end -}}
{{- end -}}
